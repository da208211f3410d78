#!/usr/bin/env bash
# A real SLURM on one Debian machine: cluster.sh up | down [--purge] | status
#
# Nodes are slurmd processes on the loopback interface, each with a host name of its own (n1, n2, ...). Configuration, keys,
# state and logs are below AVA_SLURM_DIR; of the machine itself only Debian's packages are changed, and only where they are
# missing. Needs root. Whoever uses the cluster sets SLURM_CONF to the file that `up` names.
#
#   AVA_SLURM_DIR    (/tmp/ava_exp_slurm)      AVA_SLURM_NODES  (4), each with AVA_SLURM_CPUS (2)
#   AVA_SLURM_PORT   the first of the ports    AVA_SLURM_GRACE  seconds from the warning of a pre-empted job to its end (20)
set -euo pipefail

D=${AVA_SLURM_DIR:-/tmp/ava_exp_slurm}
NODES=${AVA_SLURM_NODES:-4}
CPUS=${AVA_SLURM_CPUS:-2}
PORT=${AVA_SLURM_PORT:-16817}
GRACE=${AVA_SLURM_GRACE:-20}
PACKAGES=(munge slurmctld slurmd slurm-client)
MUNGE=$D/munge.socket
CANNOT_INSTALL=3
export SLURM_CONF=$D/slurm.conf

say() { printf 'cluster.sh: %s\n' "$*" >&2; }
fail() { say "$1"; exit "${2:-1}"; }

# A daemon is known by the process id that `spawn` wrote, if that process still runs the daemon's program.
alive() { # NAME
  local pid program
  pid=$(cat "$D/pid/$1" 2>/dev/null) || return 1
  program=$(readlink "/proc/$pid/exe" 2>/dev/null) || return 1
  [[ ${program##*/} == "${1%.*}"* ]] # Debian calls it slurmd-wlm
}

spawn() { # NAME COMMAND...: in a session of its own, which outlives this script
  local name=$1
  shift
  (cd / && exec setsid -f sh -c 'echo $$ >"$0"; exec "$@"' "$D/pid/$name" "$@" </dev/null >"$D/log/$name.out" 2>&1)
}

stop() { # NAME [SECONDS]
  alive "$1" || return 0
  local pid
  pid=$(cat "$D/pid/$1")
  kill -TERM "$pid"
  for ((i = 0; i < ${2:-10} * 20; i++)); do alive "$1" || return 0; sleep 0.05; done
  kill -KILL "$pid"
}

wait_for() { # SECONDS WHAT COMMAND...
  local seconds=$1 what=$2
  shift 2
  for ((i = 0; i < seconds * 10; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  tail -n 5 "$D"/log/*.out >&2 || true
  fail "$what did not come up in $seconds s; logs are in $D/log"
}

install_packages() {
  local missing=() package guard=/usr/sbin/policy-rc.d
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  command -v apt-get >/dev/null || fail "${missing[*]} are missing, and there is no apt-get" $CANNOT_INSTALL
  say "installing ${missing[*]}"
  # Debian starts daemons when it installs them, unless this says no.
  if [ ! -e $guard ]; then printf '#!/bin/sh\nexit 101\n' >$guard; chmod +x $guard; trap "rm -f $guard" EXIT; fi
  local options=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=120)
  export DEBIAN_FRONTEND=noninteractive
  apt-get install "${options[@]}" "${missing[@]}" >"$D/log/apt.out" 2>&1 ||
    { apt-get update && apt-get install "${options[@]}" "${missing[@]}"; } >>"$D/log/apt.out" 2>&1 ||
    fail "apt-get could not install ${missing[*]}; see $D/log/apt.out" $CANNOT_INSTALL
}

write_configuration() {
  local host
  host=$(hostname -s)
  # Job ids never repeat: submitit reads results by id.
  [ -s "$D/first_job" ] || echo $(($(date +%s) % 600000 * 100 + 1)) >"$D/first_job"
  cat >"$SLURM_CONF" <<END
ClusterName=development
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
FirstJobId=$(cat "$D/first_job")
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job starts again after cred_expire; 5 s is the least, 120 s the default
AuthInfo=socket=$MUNGE,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/pid/slurmctld.own
SlurmdPidFile=$D/pid/slurmd.%n.own
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
TreeWidth=65533
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0,preempt_youngest_first
PriorityType=priority/basic
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PartitionName=dev Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=n[1-$NODES] MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
END
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=$CPUS RealMemory=65536" >>"$SLURM_CONF"
  done
  { cat /etc/hosts; for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 n$i"; done; } >"$D/hosts"
}

start_munge() {
  alive munged && return 0
  [ -s "$D/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$D/munge.key")
  spawn munged munged --foreground --force --num-threads=2 --socket="$MUNGE" --key-file="$D/munge.key" \
    --pid-file="$D/pid/munged.own" --log-file="$D/log/munged.log" --seed-file="$D/munge.seed"
  wait_for 10 munged munge --no-input --socket="$MUNGE"
}

start_node() { # NUMBER: with names of its own for itself and its neighbours
  alive "slurmd.$1" || spawn "slurmd.$1" unshare --mount --uts --propagation slave sh -c \
    'mount --bind "$1" /etc/hosts && hostname "n$2" && exec slurmd -D -N "n$2" -f "$3"' sh "$D/hosts" "$1" "$SLURM_CONF"
}

all_idle() { [ "$(sinfo --noheader --Node --partition=dev --format='%T' | grep -c '^idle$')" = "$NODES" ]; }

up() {
  [ "$(id -u)" = 0 ] || fail "needs root"
  mkdir -p "$D"/{pid,log,state,spool}
  chmod 755 "$D"
  install_packages
  unshare --mount --uts true 2>/dev/null || fail "needs the right to make namespaces (CAP_SYS_ADMIN)" $CANNOT_INSTALL
  write_configuration
  start_munge
  alive slurmctld || spawn slurmctld slurmctld -D -f "$SLURM_CONF"
  wait_for 20 slurmctld sh -c 'scontrol ping | grep -q UP'
  for ((i = 1; i <= NODES; i++)); do mkdir -p "$D/spool/n$i"; start_node "$i"; done
  wait_for 30 nodes all_idle
  say "up: $NODES nodes; export SLURM_CONF=$SLURM_CONF"
}

down() { # [--purge]
  if alive slurmctld; then
    timeout 10 scancel --user="$(id -un)" || true
    for ((i = 0; i < 100; i++)); do [ -z "$(timeout 5 squeue --noheader)" ] && break; sleep 0.1; done
  fi
  local name
  for name in "$D"/pid/slurmd.[0-9]*; do [[ $name == *.own ]] || stop "${name##*/}"; done
  stop slurmctld 20
  stop munged
  [ "${1:-}" != --purge ] || rm -rf "$D"
  say down
}

status() {
  local name code=0
  for name in munged slurmctld $(seq -f 'slurmd.%g' "$NODES"); do
    if alive "$name"; then echo "$name up"; else echo "$name down"; code=1; fi
  done
  [ $code = 1 ] || { sinfo && squeue; }
  return $code
}

case ${1:-} in
  up | status) "$1" ;;
  down) down "${2:-}" ;;
  *) fail "usage: cluster.sh up | down [--purge] | status" 2 ;;
esac
