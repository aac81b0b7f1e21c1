/* File-system calls of one process, counted, traced and made to fail: preloaded before libc by fault_worker.py.

Calls count that concern `prefix`, what lies below it, or the folder that it stands in. Call number `nth` gets its fault:
an errno, half a write (SHORT) or SIGKILL (KILL). With `sticky`, so does every changing call after it: a disk that has
turned read-only, or full. Changes that succeed are written to `trace_fd`, one at a time, in the order they took:
a line "what\tfd\tfirst path\tsecond path\tnumber\tbytes\n", then the bytes; an open has its inode for a second path.
Before each call that counts stands a line "call", whose paths are libc's name and the path. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SHORT = -1, KILL = -2, FDS = 4096, LONGEST = 4096 };

static char prefix[LONGEST], parent[LONGEST];
static char *paths[FDS]; /* of open descriptors that concern the prefix */
static long calls, nth;
static int fault, sticky, trace_fd = -1, fired, armed;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

void faults_arm(const char *where, long number, int what, int forever, int trace) {
    strncpy(prefix, where, LONGEST - 1);
    strncpy(parent, where, LONGEST - 1);
    *strrchr(parent, '/') = 0;
    calls = 0, fired = 0, nth = number, fault = what, sticky = forever, trace_fd = trace, armed = 1;
}

long faults_calls(void) { return calls; }
int faults_fired(void) { return fired; }
void faults_disarm(void) { armed = 0; }

static int concerns(const char *path) {
    size_t length = strlen(prefix);
    return !strcmp(path, parent) || (!strncmp(path, prefix, length) && (!path[length] || path[length] == '/'));
}

/* The absolute path, or 0 where it does not concern the prefix. */
static const char *resolve(int folder, const char *path, char *room) {
    if (!armed || !path) return 0;
    if (path[0] == '/') snprintf(room, LONGEST, "%s", path);
    else if (folder >= 0 && folder < FDS && paths[folder]) snprintf(room, LONGEST, "%s/%s", paths[folder], path);
    else return 0;
    return concerns(room) ? room : 0;
}

static void trace(const char *what, int fd, const char *first, const char *second, long number, const void *data, long n) {
    if (trace_fd < 0) return;
    char line[3 * LONGEST];
    int length = snprintf(line, sizeof line, "%s\t%d\t%s\t%s\t%ld\t%ld\n", what, fd, first, second, number, n);
    syscall(SYS_write, trace_fd, line, length);
    if (n) syscall(SYS_write, trace_fd, data, n);
}

/* Count a call. 1: it must fail, errno is set; 2: it must write only half; 0: go on. */
static int struck(const char *what, const char *where, int changes) {
    calls++;
    trace("call", -1, what, where, calls, 0, 0);
    if (calls != nth && !(sticky && changes && calls > nth && nth > 0)) return 0;
    if (fault == KILL) syscall(SYS_kill, getpid(), SIGKILL);
    if (fault == 0) return 0;
    fired = 1;
    if (fault == SHORT) return 2;
    errno = fault;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define LOCKED pthread_mutex_lock(&mutex)
#define UNLOCKED pthread_mutex_unlock(&mutex)
/* Run one call on a path under the lock: count it, let it fail, or do it and trace it. */
#define ON_PATH(type, bad, where, changes, call, note) do { \
    if (!(where)) return call; \
    LOCKED; type result = bad; \
    if (struck(__func__, where, changes) != 1) { result = call; if (result != (bad)) { int kept = errno; note; errno = kept; } } \
    UNLOCKED; return result; } while (0)
#define NOTHING (void)0

static int opened(int fd, const char *where, int flags) {
    if (fd >= 0 && fd < FDS) { free(paths[fd]); paths[fd] = strdup(where); }
    struct stat found;
    char inode[32];
    fstat(fd, &found);
    snprintf(inode, sizeof inode, "%lu", (unsigned long)found.st_ino);
    trace("open", fd, where, inode, flags, 0, 0);
    return fd;
}

#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    char room[LONGEST]; const char *where = resolve(-1, path, room); \
    ON_PATH(int, -1, where, flags & (O_WRONLY | O_RDWR | O_CREAT), real(path, flags, mode), opened(result, where, flags)); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(name); va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    char room[LONGEST]; const char *where = resolve(folder, path, room); \
    ON_PATH(int, -1, where, flags & (O_WRONLY | O_RDWR | O_CREAT), real(folder, path, flags, mode), opened(result, where, flags)); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

static const char *path_of(int fd) { return armed && fd >= 0 && fd < FDS ? paths[fd] : 0; }

int close(int fd) {
    REAL(close);
    if (path_of(fd)) { LOCKED; trace("close", fd, "", "", 0, 0, 0); free(paths[fd]); paths[fd] = 0; UNLOCKED; }
    return real(fd);
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    if (!path_of(fd)) return real(fd, data, n);
    LOCKED;
    int how = struck(__func__, path_of(fd), 1);
    ssize_t done = how == 1 ? -1 : real(fd, data, how == 2 && n > 1 ? n / 2 : n);
    if (done > 0) { off_t end = syscall(SYS_lseek, fd, 0, SEEK_CUR); trace("write", fd, "", "", end - done, data, done); }
    UNLOCKED;
    return done;
}
#define PWRITE(name) ssize_t name(int fd, const void *data, size_t n, off_t at) { REAL(name); \
    ON_PATH(ssize_t, -1, path_of(fd), 1, real(fd, data, n, at), trace("write", fd, "", "", at, data, result)); }
PWRITE(pwrite) PWRITE(pwrite64)
ssize_t read(int fd, void *data, size_t n) { REAL(read); ON_PATH(ssize_t, -1, path_of(fd), 0, real(fd, data, n), NOTHING); }
#define TRUNCATE(name) int name(int fd, off_t size) { REAL(name); \
    ON_PATH(int, -1, path_of(fd), 1, real(fd, size), trace("truncate", fd, "", "", size, 0, 0)); }
TRUNCATE(ftruncate) TRUNCATE(ftruncate64)
#define SYNC(name) int name(int fd) { REAL(name); ON_PATH(int, -1, path_of(fd), 1, real(fd), trace("fsync", fd, "", "", 0, 0, 0)); }
SYNC(fsync) SYNC(fdatasync)
int fchmod(int fd, mode_t mode) { REAL(fchmod); ON_PATH(int, -1, path_of(fd), 1, real(fd, mode), NOTHING); }
int flock(int fd, int how) { REAL(flock); ON_PATH(int, -1, path_of(fd), 0, real(fd, how), NOTHING); }

static const char *either(const char *a, const char *b) { return a ? a : b; }
int rename(const char *from, const char *to) {
    REAL(rename); char a[LONGEST], b[LONGEST]; const char *first = resolve(-1, from, a), *second = resolve(-1, to, b);
    ON_PATH(int, -1, either(first, second), 1, real(from, to), trace("rename", -1, from, to, 0, 0, 0));
}
int renameat(int f, const char *from, int t, const char *to) {
    REAL(renameat); char a[LONGEST], b[LONGEST]; const char *first = resolve(f, from, a), *second = resolve(t, to, b);
    ON_PATH(int, -1, either(first, second), 1, real(f, from, t, to), trace("rename", -1, first, second, 0, 0, 0));
}
#define REMOVE(name, what) int name(const char *path) { REAL(name); char room[LONGEST]; const char *where = resolve(-1, path, room); \
    ON_PATH(int, -1, where, 1, real(path), trace(what, -1, where, "", 0, 0, 0)); }
REMOVE(unlink, "unlink") REMOVE(rmdir, "rmdir")
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); char room[LONGEST]; const char *where = resolve(folder, path, room);
    ON_PATH(int, -1, where, 1, real(folder, path, flags), trace(flags & AT_REMOVEDIR ? "rmdir" : "unlink", -1, where, "", 0, 0, 0));
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir); char room[LONGEST]; const char *where = resolve(-1, path, room);
    ON_PATH(int, -1, where, 1, real(path, mode), trace("mkdir", -1, where, "", 0, 0, 0));
}
DIR *opendir(const char *path) {
    REAL(opendir); char room[LONGEST]; const char *where = resolve(-1, path, room);
    ON_PATH(DIR *, 0, where, 0, real(path), NOTHING);
}
#define STAT(name, kind) int name(const char *path, struct kind *found) { REAL(name); char room[LONGEST]; \
    const char *where = resolve(-1, path, room); ON_PATH(int, -1, where, 0, real(path, found), NOTHING); }
STAT(stat, stat) STAT(lstat, stat) STAT(stat64, stat64) STAT(lstat64, stat64) STAT(statvfs, statvfs) STAT(statvfs64, statvfs64)
