# Becomes the service manager of a machine whose files are those of this machine, and what is
# installed here as docs/operations.md says. Runs in namespaces of mounts, processes, names and
# control groups, which end with it. Whatever is written there is in memory and gone at the end.
#
#   sh machine.sh DIRECTORY SOURCE QRELAY
#
# DIRECTORY is an empty directory, SOURCE the source directory's systemd/, QRELAY the program. No
# unit of this machine is used but those of the journal.
set -eu
directory=$1 source=$2 qrelay=$3
root=$directory/root

mount -t tmpfs -o mode=755 tmpfs "$directory"
mkdir "$directory/lower" "$directory/upper" "$directory/work" "$root"
mount --bind / "$directory/lower"
mount -t overlay overlay "$root" \
  -o "lowerdir=$directory/lower,upperdir=$directory/upper,workdir=$directory/work"

# The service manager can't change this machine's kernel or devices.
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"

units=$root/etc/systemd/system
rm -rf "$units"
mkdir -p "$units" "$root/etc/systemd/journald.conf.d" "$root/etc/tmpfiles.d" \
  "$root/etc/sysusers.d" "$root/etc/cm4all/qrelay"
for target in sysinit basic sockets shutdown multi-user network-online nss-user-lookup; do
  printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' "$target" >"$units/$target.target"
done
for unit in journald.service journald.socket journald-dev-log.socket; do
  cp "/lib/systemd/system/systemd-$unit" "$units"
done
printf '[Journal]\nAudit=no\nReadKMsg=no\nStorage=volatile\n' \
  >"$root/etc/systemd/journald.conf.d/test.conf"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"

# What docs/operations.md installs.
cp "$source"/cm4all-qrelay*.service "$source/cm4all-qrelay.socket" "$units"
cp "$source/sysusers.d/cm4all-qrelay.conf" "$root/etc/sysusers.d"
cp "$source/tmpfiles.d/cm4all-qrelay.conf" "$root/etc/tmpfiles.d"
touch "$root/usr/bin/qrelay"
mount --bind "$qrelay" "$root/usr/bin/qrelay"

cd "$root"
pivot_root . .
umount -l .
systemd-sysusers cm4all-qrelay.conf
systemd-tmpfiles --create cm4all-qrelay.conf
exec env -i container=qrelay PATH="$PATH" SYSTEMD_UNIT_PATH=/etc/systemd/system \
  SYSTEMD_GENERATOR_PATH=/nowhere SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nowhere \
  /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
