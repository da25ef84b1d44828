# What tests/fresh, tests/package and tests/container make machines with: a minimal Debian 12 in a
# directory, and namespaces to run something in it. To be sourced.
#
# Whatever runs in a machine does so in namespaces of mounts and processes. They end with the first
# process in them, so that no mount and no process stays behind, even if the script is killed.

# --- Namespaces ----------------------------------------------------------------------------------

contained='' # pid of unshare, which waits for the first process inside
group=''     # control group of what runs inside

# start OPTION… COMMAND…: starts a command in namespaces of mounts and processes. OPTIONs of unshare
# add more.
start() {
  setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child "$@" <&0 &
  contained=$!
}

# contain OPTION… COMMAND…: the same, and waits for its end. In the background, so that a signal is
# handled at once.
contain() {
  local status=0
  start "$@"
  wait "$contained" || status=$?
  contained=''
  return "$status"
}

# Ends what is contained. With the first process inside all others end, and then unshare.
end_contained() {
  local first
  while [ -n "$contained" ] && kill -0 "$contained" 2>/dev/null; do
    read -r first <"/proc/$contained/task/$contained/children" 2>/dev/null || true
    kill -KILL "${first:-$contained}" 2>/dev/null || true
    sleep 0.05
  done
  contained=''
}

# enter_group NAME: puts this process into a control group of its own, which is the root of what is
# seen in a control group namespace. Sets `back`, the directory of the group before.
enter_group() {
  local mount own
  mount=$(findmnt --noheadings --list --types cgroup2 --output TARGET | sed -n 1p)
  own=$(sed -n 's/^0:://p' /proc/self/cgroup)
  back=$mount${own%/}
  if [ -n "$mount" ] && mkdir "$back/$1"; then
    group=$back/$1
    echo $$ >"$group/cgroup.procs"
  fi
}

remove_group() {
  [ -n "$group" ] || return 0
  echo $$ >"$1/cgroup.procs"
  find "$group" -depth -type d -exec rmdir {} \;
  group=''
}

# mount_machine ROOT: mounts what every machine has, in the machine's own namespaces.
mount_machine() {
  mount --bind "$1" "$1"
  mount -o remount,bind,exec,suid,dev "$1"
  mount -t proc -o nosuid,nodev,noexec proc "$1/proc"
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$1/sys"
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$1/sys/fs/cgroup"
  mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts "$1/dev/pts"
  mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$1/dev/shm"
}

# --- Debian ---------------------------------------------------------------------------------------

install_mmdebstrap() {
  command -v mmdebstrap >/dev/null && return
  command -v apt-get >/dev/null || die 'mmdebstrap is needed'
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends mmdebstrap </dev/null
}

# The lines of sources.list for Debian 12 that this machine uses. Without any, mmdebstrap has
# defaults.
apt_sources() {
  # shellcheck disable=SC2016 # the names are apt's
  apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 'Origin: Debian' | grep ' bookworm' | sort -u
}

# apt's settings about proxies, certificates and clocks.
apt_settings() {
  apt-config dump | grep -iE '^Acquire::(https?::|Check-|Retries)' | grep -v Auto-Detect
}

# make_debian ROOT PACKAGE…: makes a minimal Debian 12 with these packages in a directory, and puts
# files for apt into the directory above.
make_debian() {
  local root=$1 above=${1%/*} mirror=() include=()
  apt_settings >"$above/apt.conf" || true
  apt_sources >"$above/sources.list" || true
  [ ! -s "$above/sources.list" ] || mirror=("$above/sources.list")
  shift
  [ $# -eq 0 ] || include=(--include="$(IFS=,; echo "$*")")
  contain --mount-proc mmdebstrap --quiet --variant=minbase "${include[@]}" \
    --aptopt="$above/apt.conf" bookworm "$root" "${mirror[@]}"
  cp --dereference /etc/resolv.conf "$root/etc/resolv.conf"
  # A proxy may have certificates that only this machine knows.
  if [ -e /etc/ssl/certs/ca-certificates.crt ] && [ -e "$root/etc/ssl/certs" ]; then
    cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  fi
}
