/* A library that a hostile script loads into its worker or zygote. Each function plays one attack on
 * the supervisor, over the sockets that the process has from it. A function has the type of a
 * lua_CFunction, and uses nothing of Lua. It starts a thread and returns, so that the process goes
 * on as if nothing were wrong.
 *
 * In a worker the local SEQPACKET sockets are, by their numbers: jobs, control, opener. In a zygote
 * they are: orders, opener. Bytes of messages are as postcard encodes them. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { JOBS, CONTROL, OPENER, SOCKETS };
enum { ORDERS, ZYGOTE_OPENER };

/* More than any process gets. */
enum { MOST = 1024, MESSAGE = 128 * 1024 };

/* Small entries that fill a dictionary. */
enum { FULL = 1 << 16 };

static int sockets[SOCKETS];
static char bytes[2 * MESSAGE];

static int by_number(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static void find_sockets(void) {
  int found[MOST], count = 0;
  for (int fd = 0; fd < MOST; fd++) {
    int type = 0, domain = 0;
    socklen_t size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_SEQPACKET) continue;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) || domain != AF_UNIX) continue;
    found[count++] = fd;
  }
  qsort(found, (size_t)count, sizeof found[0], by_number);
  for (int at = 0; at < SOCKETS; at++) sockets[at] = at < count ? found[at] : -1;
}

/* Sends the same datagram for ever, or until the socket is gone. */
static void flood(int fd, const void *data, size_t length) {
  while (send(fd, data, length, MSG_NOSIGNAL) >= 0) {}
}

static void send_rights(int fd, const void *data, size_t length) {
  int null = open("/dev/null", O_RDONLY);
  char control[CMSG_SPACE(sizeof null)] = {0};
  struct iovec slice = {(void *)data, length};
  struct msghdr header = {.msg_iov = &slice, .msg_iovlen = 1};
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof null);
  memcpy(CMSG_DATA(rights), &null, sizeof null);
  while (sendmsg(fd, &header, MSG_NOSIGNAL) >= 0) {}
}

/* Asks for a channel, and returns it, or -1 if that is refused. */
static int get_channel(int opener) {
  char answer[256], control[CMSG_SPACE(sizeof(int))];
  struct iovec slice = {answer, sizeof answer};
  struct msghdr header = {.msg_iov = &slice, .msg_iovlen = 1};
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  if (send(opener, "\0", 1, MSG_NOSIGNAL) < 0 || recvmsg(opener, &header, 0) <= 0) return -1;
  struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
  int fd;
  if (!rights || rights->cmsg_type != SCM_RIGHTS) return -1;
  memcpy(&fd, CMSG_DATA(rights), sizeof fd);
  return fd;
}

static int get_all(int opener, int *channels) {
  int count = 0;
  while (count < MOST && (channels[count] = get_channel(opener)) >= 0) count++;
  return count;
}

/* A question to the dictionary "d": its name, a key of four letters, the operation. */
static size_t question(char *to, unsigned number, const char *operation, size_t length) {
  memcpy(to, "\1d\4", 3);
  for (int at = 3; at < 7; at++, number >>= 4) to[at] = (char)('a' + (number & 15));
  memcpy(to + 7, operation, length);
  return 7 + length;
}

static const char SET_ONE[] = {1, 1, 2, 0};           /* Set{Integer(1), None} */
static const char KEYS[] = {5, (char)0x90, 0x4e};     /* Keys{10000} */
static const char SET_LONG[] = {1, 0, (char)0xe0, (char)0xd4, 3}; /* Set{String(60000 bytes… */

/* Asks the dearest questions on every channel that it can get, one at a time on each, and reads the
 * answers. */
static void ask_dearly(int opener) {
  static int channels[MOST];
  static char answer[MESSAGE], waits[MOST];
  int count = get_all(opener, channels);
  for (unsigned number = 0;;) {
    for (int at = 0; at < count; at++) {
      if (waits[at] && recv(channels[at], answer, sizeof answer, MSG_DONTWAIT) < 0) continue;
      size_t length = question(bytes, number++, SET_ONE, sizeof SET_ONE);
      if (number > FULL && at % 2) {
        length = question(bytes, number, SET_LONG, sizeof SET_LONG) + 60000;
        bytes[length++] = 0;
      } else if (number > FULL) {
        length = question(bytes, 0, KEYS, sizeof KEYS);
      }
      waits[at] = send(channels[at], bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL) > 0;
    }
  }
}

static void *forever(void *run) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, NULL);
  ((void (*)(void))run)();
  return NULL;
}

static void in_thread(void (*run)(void)) {
  pthread_t thread;
  find_sockets();
  pthread_create(&thread, NULL, forever, (void *)run);
}

#define ATTACK(name, ...) \
  static void run_##name(void) { __VA_ARGS__; } \
  int name(void *lua) { (void)lua; in_thread(run_##name); return 0; }

/* In a worker, on its job socket. */
ATTACK(ready, flood(sockets[JOBS], "\0", 1))
ATTACK(batch, memset(bytes, 0, sizeof bytes); flood(sockets[JOBS], bytes, 100000))
ATTACK(nonsense, memset(bytes, 0xff, sizeof bytes); flood(sockets[JOBS], bytes, 1000))
ATTACK(toolarge, memset(bytes, 0, sizeof bytes); flood(sockets[JOBS], bytes, MESSAGE + 1))
ATTACK(done, flood(sockets[JOBS], "\5\x7f\0", 3))
ATTACK(lost, flood(sockets[JOBS], "\4\x7f", 2))
ATTACK(child, flood(sockets[JOBS], "\1\x7f\2", 3))
ATTACK(timelimit, flood(sockets[JOBS], "\3\x7f\1", 3))
ATTACK(empty, flood(sockets[JOBS], "", 0))
ATTACK(hangup, shutdown(sockets[JOBS], SHUT_WR))
ATTACK(jobrights, send_rights(sockets[JOBS], "\0", 1))
/* On its control socket. */
ATTACK(pongs, flood(sockets[CONTROL], "\1\0\0\0\0\0\0\0", 8))
ATTACK(controlnonsense, memset(bytes, 0xff, sizeof bytes); flood(sockets[CONTROL], bytes, 1000))
ATTACK(controlrights, send_rights(sockets[CONTROL], "\1\0\0\0\0", 5))
ATTACK(controlhangup, shutdown(sockets[CONTROL], SHUT_RD))
ATTACK(silent, int pair[2]; /* The old socket stays open, and nobody answers on it. */
       if (dup(sockets[CONTROL]) < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair)) return;
       dup2(pair[0], sockets[CONTROL]))
/* On its opener and the channels from it. */
ATTACK(wishes, flood(sockets[OPENER], "\0", 1))
ATTACK(openernonsense, flood(sockets[OPENER], "\x7f", 1))
ATTACK(openerrights, send_rights(sockets[OPENER], "\0", 1))
ATTACK(hoard, for (;;) get_channel(sockets[OPENER]))
ATTACK(openandclose, for (;;) close(get_channel(sockets[OPENER])))
ATTACK(unread, int fd = get_channel(sockets[OPENER]);
       flood(fd, bytes, question(bytes, 0, KEYS, sizeof KEYS)))
ATTACK(asknonsense, int fd = get_channel(sockets[OPENER]); flood(fd, "\x7f", 1))
ATTACK(askrights, int fd = get_channel(sockets[OPENER]);
       send_rights(fd, bytes, question(bytes, 0, KEYS, sizeof KEYS)))
ATTACK(dear, ask_dearly(sockets[OPENER]))

/* In a zygote, while the script loads. */
ATTACK(zforked, flood(sockets[ORDERS], "\2\1\2", 3))
ATTACK(zfailed, flood(sockets[ORDERS], "\1\1x\0", 4))
ATTACK(znonsense, memset(bytes, 0xff, sizeof bytes); flood(sockets[ORDERS], bytes, 1000))
ATTACK(zrights, send_rights(sockets[ORDERS], "\1\1x\0", 4))
ATTACK(zwishes, flood(sockets[ZYGOTE_OPENER], "\0", 1))
ATTACK(zunread, int fd = get_channel(sockets[ZYGOTE_OPENER]);
       flood(fd, bytes, question(bytes, 0, KEYS, sizeof KEYS)))
ATTACK(zdear, ask_dearly(sockets[ZYGOTE_OPENER]))
