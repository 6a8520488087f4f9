#!/usr/bin/env bash
# Training under Slurm, on one node or many; a job whose time is over goes on by itself.
#
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-gpu 4 --time 24:00:00 scripts/slurm_train.sh RECIPE [key=value ...]
#   sbatch --nodes 2 --ntasks-per-node 4 scripts/slurm_train.sh RECIPE [key=value ...]        (on CPUs)
#
# One task a GPU, started by srun, so that Slurm's signals reach the ranks. 180 s before the end of its time (another
# span: sbatch --signal=USR1@SECONDS) a run finishes its step, writes a checkpoint and ends with 138; the job is then
# put back into the queue. After anything else the job ends with the run's exit status. Start it from the folder that
# paths in the recipe are relative to. Python is that of $VENV, else of .venv, else python3.
# MASTER_ADDR and MASTER_PORT are chosen (the first node's name, a port by job id) unless they are set.

#SBATCH --job-name=llava_train
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
#SBATCH --requeue
set -euo pipefail
stopped_by_usr1=138 # 128 + SIGUSR1

fail() { echo "slurm_train: $*" >&2; exit 2; }

case ${1:---help} in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit $(($# ? 0 : 2)) ;; esac
[ -n "${SLURM_JOB_ID:-}" ] || fail "start it with sbatch; see --help"
[ -f "$1" ] || fail "$1: there is no such recipe in $PWD"
[ -z "${VENV:-}" ] || [ -x "$VENV/bin/python" ] || fail "VENV=$VENV has no bin/python"
PYTHON=python3
[ ! -x "${VENV:=.venv}/bin/python" ] || PYTHON=$VENV/bin/python

nodes=$SLURM_JOB_NUM_NODES
tasks=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-$nodes} / nodes))}}
cpus=$((SLURM_CPUS_ON_NODE / tasks))
[ "$cpus" -ge 1 ] || fail "$SLURM_CPUS_ON_NODE CPUs for $tasks tasks on a node: ask for more, e.g. --cpus-per-gpu 4"
# srun reads these, too: they contradict what it is given below, or leave a task only one of its node's GPUs.
unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK
unset SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK SLURM_GPU_BIND

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
WORLD_SIZE=$((nodes * tasks)) LOCAL_WORLD_SIZE=$tasks
export PYTHON MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE
start=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "slurm_train: job $SLURM_JOB_ID, start $start: $nodes nodes x $tasks tasks x $cpus CPUs" >&2

# Every task sees all GPUs that the job has on its node and takes that of its LOCAL_RANK. A rank that ends takes the
# others with it, but only after a minute: rank 0 may still be writing when the others are done.
status=0
srun --nodes "$nodes" --ntasks "$WORLD_SIZE" --ntasks-per-node "$tasks" --cpus-per-task "$cpus" --wait 60 \
  bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$PYTHON" -m llava_train train "$@"' rank "$@" ||
  status=$?

if [ "$status" -eq "$stopped_by_usr1" ]; then
  echo "slurm_train: stopped by SIGUSR1; job $SLURM_JOB_ID goes back into the queue, then on from its checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID" || fail "could not be put back; submit it again, it goes on from the checkpoint"
fi
exit "$status"
