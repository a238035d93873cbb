/* What a fork changes: the teams and the calls of this process. Threads read and write both at the same time. */
#ifndef FASTLSTM_FORK_H
#define FASTLSTM_FORK_H

#include <pthread.h>

/* libgomp hangs in a forked child whose parent had a team: such a child runs serial. */
static int fl_teams, fl_forked, fl_calls; /* calls: under way */

static inline void fl_in_child(void) { fl_forked = fl_teams, fl_calls = 0; }
static inline void fl_watch_fork(void) { pthread_atfork(0, 0, fl_in_child); }
static inline void fl_has_team(void) { __atomic_store_n(&fl_teams, 1, __ATOMIC_RELAXED); }
static inline int fl_count(int by) { return __atomic_add_fetch(&fl_calls, by, __ATOMIC_RELAXED); }

#endif
