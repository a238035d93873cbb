/* libgomp hangs in a forked child whose parent had a team: such a child runs serial. */
#ifndef FASTLSTM_FORK_H
#define FASTLSTM_FORK_H

#include <pthread.h>

static int fl_teams, fl_forked, fl_calls; /* calls: under way, changes under the GIL */
static void fl_in_child(void) { fl_forked = fl_teams, fl_calls = 0; }
static inline void fl_watch_fork(void) { pthread_atfork(0, 0, fl_in_child); }

#endif
