/* A disk that fails, for the soak: preloaded into a rank, it lets calls on files of a folder fail.

   PHI3V_DISK_FOLDER  whose files are meant
   PHI3V_DISK_CALLS   w: write and flush, r: read
   PHI3V_DISK_ERRNO   what they fail with
   PHI3V_DISK_FIRST, PHI3V_DISK_LAST  the numbers, from 1, of the calls that fail in each process */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *folder, *calls;
static long first, last, seen;
static int number;

__attribute__((constructor)) static void begin(void) {
    folder = getenv("PHI3V_DISK_FOLDER");
    if (!folder) return;
    calls = getenv("PHI3V_DISK_CALLS");
    number = atoi(getenv("PHI3V_DISK_ERRNO"));
    first = atol(getenv("PHI3V_DISK_FIRST"));
    last = atol(getenv("PHI3V_DISK_LAST"));
}

static int fails(int handle, char call) {
    char link[32], path[PATH_MAX];
    int before = errno;
    if (!folder || !strchr(calls, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    long mine = __sync_add_and_fetch(&seen, 1);
    if (mine < first || mine > last) return 0;
    errno = number;
    return 1;
}

#define FAILING(call, result, name, takes, gives)                       \
    result name takes {                                                 \
        static result(*real) takes;                                     \
        if (!real) real = dlsym(RTLD_NEXT, #name);                      \
        return fails(handle, call) ? -1 : real gives;                   \
    }

FAILING('w', ssize_t, write, (int handle, const void *data, size_t size), (handle, data, size))
FAILING('w', ssize_t, writev, (int handle, const struct iovec *parts, int count),
        (handle, parts, count))
FAILING('w', ssize_t, pwrite64, (int handle, const void *data, size_t size, off64_t at),
        (handle, data, size, at))
FAILING('w', int, fsync, (int handle), (handle))
FAILING('w', int, fdatasync, (int handle), (handle))
FAILING('r', ssize_t, read, (int handle, void *data, size_t size), (handle, data, size))
FAILING('r', ssize_t, pread64, (int handle, void *data, size_t size, off64_t at),
        (handle, data, size, at))
