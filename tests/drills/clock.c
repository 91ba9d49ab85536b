/* Preloaded into a process, this sets its wall clock off by the seconds that stand in the file $DRILL_CLOCK, looked at five times
   a second. The monotonic clock, sleeps and timers are the kernel's own. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long offset_now;
static volatile long looked; /* fifths of a second of the monotonic clock */

static long offset(void) {
    struct timespec at;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &at);
    long now = at.tv_sec * 5 + at.tv_nsec / 200000000;
    if (now != looked) {
        const char *path = getenv("DRILL_CLOCK");
        FILE *file = path ? fopen(path, "re") : NULL;
        long value;
        looked = now;
        if (file) {
            if (fscanf(file, "%ld", &value) == 1) offset_now = value;
            fclose(file);
        }
    }
    return offset_now;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    long failed = syscall(SYS_clock_gettime, clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += offset();
    return (int)failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
