/* Records what a process makes, renames, removes and syncs below a folder, and kills it at a chosen event.

   powercut_begin(root, log, at) starts the record: `log` gets one line per event, tabs between its fields, and a
   copy LOG.N of each file at its sync N, which is what a disk is sure to hold. Event `at` does not happen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[PATH_MAX], logname[PATH_MAX];
static int logfile = -1, count, last;
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void powercut_begin(const char *below, const char *log, int at) {
    snprintf(root, sizeof root, "%s", below);
    snprintf(logname, sizeof logname, "%s", log);
    count = 0;
    last = at;
    logfile = REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
}

static int ours(const char *path) { return logfile >= 0 && strncmp(path, root, strlen(root)) == 0; }

static void full(int folder, const char *path, char *out) {
    char link[64], base[PATH_MAX] = "";
    if (path[0] != '/' && folder != AT_FDCWD) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n > 0 ? n : 0] = 0;
    } else if (path[0] != '/' && !getcwd(base, sizeof base)) base[0] = 0;
    if (path[0] == '/') snprintf(out, PATH_MAX, "%s", path);
    else snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
}

static int event(const char *kind, const char *a, const char *b) {
    char line[2 * PATH_MAX + 64];
    pthread_mutex_lock(&one);
    if (++count == last) raise(SIGKILL);
    int number = count, n = snprintf(line, sizeof line, "%d\t%s\t%s\t%s\n", number, kind, a, b);
    if (write(logfile, line, n) != n) raise(SIGABRT);
    pthread_mutex_unlock(&one);
    return number;
}

static void synced(int fd) {
    char link[64], path[PATH_MAX], copy[PATH_MAX + 16], inode[32], block[65536];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1), got;
    if (n < 0) return;
    path[n] = 0;
    if (!ours(path) || fstat(fd, &status)) return;
    snprintf(inode, sizeof inode, "%lu", (unsigned long)status.st_ino);
    if (S_ISDIR(status.st_mode)) { event("syncdir", path, inode); return; }
    int number = event("sync", path, inode), in = REAL(open)(path, O_RDONLY);
    snprintf(copy, sizeof copy, "%s.%d", logname, number);
    int out = REAL(open)(copy, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while (in >= 0 && (got = read(in, block, sizeof block)) > 0)
        if (write(out, block, got) != got) raise(SIGABRT);
    close(in);
    close(out);
}

int fsync(int fd) { synced(fd); return 0; }
int fdatasync(int fd) { synced(fd); return 0; }

static void made(const char *path, int was) {
    struct stat status;
    char inode[32];
    if (was || !ours(path) || stat(path, &status)) return;
    snprintf(inode, sizeof inode, "%lu", (unsigned long)status.st_ino);
    event("create", path, inode);
}

#define OPEN(name, parameters, call, folder)                                                                     \
    int name parameters {                                                                                        \
        mode_t mode = 0;                                                                                         \
        char path[PATH_MAX];                                                                                     \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, int); va_end(list); } \
        full(folder, file, path);                                                                                \
        int was = !(flags & O_CREAT) || access(path, F_OK) == 0, fd = REAL(name) call;                           \
        if (fd >= 0) made(path, was);                                                                            \
        return fd;                                                                                               \
    }
OPEN(open, (const char *file, int flags, ...), (file, flags, mode), AT_FDCWD)
OPEN(open64, (const char *file, int flags, ...), (file, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *file, int flags, ...), (folder, file, flags, mode), folder)
OPEN(openat64, (int folder, const char *file, int flags, ...), (folder, file, flags, mode), folder)

#define FOPEN(name)                                                                                              \
    FILE *name(const char *file, const char *how) {                                                              \
        char path[PATH_MAX];                                                                                     \
        full(AT_FDCWD, file, path);                                                                              \
        int was = access(path, F_OK) == 0;                                                                       \
        FILE *stream = REAL(name)(file, how);                                                                    \
        if (stream) made(path, was);                                                                             \
        return stream;                                                                                           \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define CHANGE(name, parameters, call, folder, kind)                                                             \
    int name parameters {                                                                                        \
        char path[PATH_MAX];                                                                                     \
        full(folder, file, path);                                                                                \
        if (ours(path) && access(path, F_OK) == (strcmp(kind, "mkdir") ? 0 : -1)) event(kind, path, "");         \
        return REAL(name) call;                                                                                  \
    }
CHANGE(unlink, (const char *file), (file), AT_FDCWD, "remove")
CHANGE(unlinkat, (int folder, const char *file, int flags), (folder, file, flags), folder, "remove")
CHANGE(rmdir, (const char *file), (file), AT_FDCWD, "remove")
CHANGE(mkdir, (const char *file, mode_t mode), (file, mode), AT_FDCWD, "mkdir")

int rename(const char *file, const char *to) {
    char a[PATH_MAX], b[PATH_MAX];
    full(AT_FDCWD, file, a);
    full(AT_FDCWD, to, b);
    if (ours(a)) event("rename", a, b);
    return REAL(rename)(file, to);
}
