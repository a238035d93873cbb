/* How many threads the system grants. libgomp ends the process when it is refused one, so we ask before it does. */
#ifndef FASTLSTM_SPARE_H
#define FASTLSTM_SPARE_H

#include <pthread.h>

/* Of this thread's last team, which libgomp keeps for its next one. */
static __thread int fl_last_team;

static inline void *fl_stand_by(void *lock)
{
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return 0;
}

/* Start `wanted` threads, all at once, and end them again: how many there were; *error says why not all. */
static inline int fl_spare_threads(int wanted, pthread_t *threads, int *error)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int count = 0;
    *error = 0;
    pthread_mutex_lock(&lock);
    while (count < wanted && !(*error = pthread_create(&threads[count], 0, fl_stand_by, &lock)))
        count++;
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], 0);
    return count;
}

#endif
