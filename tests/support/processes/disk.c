/* A disk that is watched, and that fails when it is told to: loaded before the C library (LD_PRELOAD).
 *
 * DISK_UNDER      what files are meant: those whose path begins so
 * DISK_LOG        where each write, cut and sync of them is recorded, in the order in which it ended
 * DISK_FAULT      what goes wrong, once: "kill-before-sync:N", "kill-after-sync:N", "eio-sync:N", "eio-write:N",
 *                 "enospc-write:N" at the Nth such call; every later call of that kind fails as well, but for a kill
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

struct record {
    uint32_t kind; /* 1 write, 2 cut, 3 sync */
    uint32_t path_bytes;
    uint64_t offset;
    uint64_t data_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -2;
static long syncs, writes;

static void record(uint32_t kind, const char *path, uint64_t offset, const void *data, uint64_t bytes)
{
    if (log_fd == -2) {
        const char *where = getenv("DISK_LOG");
        log_fd = where ? (int)syscall(SYS_openat, AT_FDCWD, where, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    }
    if (log_fd < 0)
        return;
    struct record head = {kind, (uint32_t)strlen(path), offset, kind == 1 ? bytes : 0};
    size_t size = sizeof head + head.path_bytes + head.data_bytes;
    char *whole = malloc(size);
    memcpy(whole, &head, sizeof head);
    memcpy(whole + sizeof head, path, head.path_bytes);
    if (kind == 1)
        memcpy(whole + sizeof head + head.path_bytes, data, bytes);
    if (syscall(SYS_write, log_fd, whole, size) != (long)size)
        abort();
    free(whole);
}

static int meant(int fd, char *path)
{
    const char *under = getenv("DISK_UNDER");
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
    if (under == NULL || length <= 0)
        return 0;
    path[length] = 0;
    return strncmp(path, under, strlen(under)) == 0;
}

static long wanted(const char *kind)
{
    const char *fault = getenv("DISK_FAULT");
    size_t length = strlen(kind);
    return fault && strncmp(fault, kind, length) == 0 && fault[length] == ':' ? atol(fault + length + 1) : 0;
}

static int write_fails(void)
{
    long now = ++writes, eio = wanted("eio-write"), enospc = wanted("enospc-write");
    if (eio && now >= eio)
        return EIO;
    return enospc && now >= enospc ? ENOSPC : 0;
}

static ssize_t do_write(int fd, const void *data, size_t bytes, off_t offset)
{
    char path[4096];
    if (!meant(fd, path))
        return syscall(SYS_pwrite64, fd, data, bytes, offset);
    pthread_mutex_lock(&lock);
    int failed = write_fails();
    ssize_t done = failed ? -1 : syscall(SYS_pwrite64, fd, data, bytes, offset);
    if (done > 0)
        record(1, path, (uint64_t)offset, data, (uint64_t)done);
    pthread_mutex_unlock(&lock);
    if (failed)
        errno = failed;
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off_t offset) { return do_write(fd, data, bytes, offset); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) { return do_write(fd, data, bytes, offset); }

static int do_cut(int fd, off_t size)
{
    char path[4096];
    if (!meant(fd, path))
        return (int)syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int done = (int)syscall(SYS_ftruncate, fd, size);
    if (done == 0)
        record(2, path, (uint64_t)size, NULL, 0);
    pthread_mutex_unlock(&lock);
    return done;
}

int ftruncate64(int fd, off_t size) { return do_cut(fd, size); }
int ftruncate(int fd, off_t size) { return do_cut(fd, size); }

static int do_sync(int fd, long number)
{
    char path[4096];
    if (!meant(fd, path))
        return (int)syscall(number, fd);
    pthread_mutex_lock(&lock);
    long now = ++syncs, eio = wanted("eio-sync");
    if (now == wanted("kill-before-sync"))
        kill(getpid(), SIGKILL);
    int done = eio && now >= eio ? -1 : (int)syscall(number, fd);
    if (done == 0)
        record(3, path, 0, NULL, 0);
    if (now == wanted("kill-after-sync"))
        kill(getpid(), SIGKILL);
    pthread_mutex_unlock(&lock);
    if (eio && now >= eio)
        errno = EIO;
    return done;
}

int fsync(int fd) { return do_sync(fd, SYS_fsync); }
int fdatasync(int fd) { return do_sync(fd, SYS_fdatasync); }
