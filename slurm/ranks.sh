# shellcheck shell=bash disable=SC2034,SC2154
# Starts the ranks of a step on every node of the job, tells them when time is up, decides whether the job goes on.
# Sourced by the scripts whose step runs on several processes, after site.env:
#
#   about RECIPE                 sets: run, the run folder; processes, in all; requeues, how many are allowed; drawing,
#                                how many of the processes `ppcl evaluate` is for
#   run_ranks FOLDER ARGUMENTS   runs `ppcl ARGUMENTS`, the step first, whose checkpoints are in FOLDER/checkpoints
#
# How it ends:
#   all is done                         exit code 0, and what waits for this job starts
#   time was up, or a node is wanted    the ranks have written a checkpoint; the job requeues itself and goes on
#   a STOP file lies in the run folder  the ranks have written a checkpoint; the job and what waits for it are cancelled
#   a rank has failed                   the job requeues itself if this start has made a checkpoint, else it fails
#   a node is lost                      Slurm requeues the job

start=${SLURM_RESTART_COUNT:-0}
# SLURM_JOB_ID of an array's last task is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
told=''
# Before anything starts, for time may be up while the ranks load. Only this shell is signalled (B:), and passes it on.
trap 'told=1' USR1 TERM

about() {
    local facts
    facts=$(srun --overlap --nodes=1 --ntasks=1 "${container[@]}" "$python" -m ppcl_ds.cluster.facts "$1")
    { read -r run && read -r processes && read -r requeues && read -r drawing; } <<<"$facts"
}

run_ranks() {
    local folder=$1 latest=$1/checkpoints/latest before ranks code=0
    shift
    before=$(cat "$latest" 2>/dev/null || true)
    rm -f "$folder/stopped"

    read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # below the ports that systems give away
    each=$((processes / SLURM_JOB_NUM_NODES))
    logs=$run/slurm/logs/$1-$job/start-$start
    export MASTER_ADDR MASTER_PORT python each logs
    echo "==== start $start, $(date -Is): $processes processes on $SLURM_JOB_NODELIST, a log of each in $logs"

    srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        "${container[@]}" bash -c "$(declare -f on_each_node); on_each_node \"\$@\"" bash "$@" &
    ranks=$!
    while kill -0 $ranks 2>/dev/null; do
        # Again and again: a rank that is still loading does not look yet. scancel leaves this shell out.
        [[ -z $told ]] || scancel --quiet --signal=USR1 "$job" || true
        sleep 2 &
        wait $! || true  # a signal cuts it short
    done
    wait $ranks || code=$?

    if ((code)); then
        if [[ $(cat "$latest" 2>/dev/null || true) == "$before" ]]; then
            echo "error: the ranks have failed (exit code $code) without a checkpoint since this start; not requeued" >&2
            exit "$code"
        fi
        requeue "the ranks have failed (exit code $code), but have made a checkpoint since this start"
    elif [[ ! -e $folder/stopped ]]; then
        return
    elif [[ $(cat "$folder/stopped") == STOP ]]; then
        echo "stopped by $run/STOP; to go on: ppcl submit RECIPE --from $1"
        scancel "$job"  # and with it what waits for this job
    else
        requeue "time is up, and there is a checkpoint"
    fi
    exit 1
}

# One node's part: a torchrun, whose ranks meet those of the other nodes at the first node's.
# USR1 ends none of these processes, their readers and helpers: it stays pending, and ranks look for it between steps.
on_each_node() {
    trap '' USR1
    block_usr1='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
    # shellcheck disable=SC2016
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
    # What NCCL remembers of each rank's last collectives; the watchdog puts it into the training's folder.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    mkdir -p "$logs/$SLURMD_NODENAME"
    exec "$python" -c "$block_usr1" -m torch.distributed.run \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$each" --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$SLURM_STEP_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --rdzv-conf="is_host=$((SLURM_NODEID == 0)),read_timeout=600" --local-addr="$SLURMD_NODENAME" \
        --log-dir="$logs/$SLURMD_NODENAME" --redirects=3 --tee=0:3 \
        -m ppcl_ds.cli "$@"
}

# Give the nodes back and wait for new ones; not if somebody is ending the job, who will not want it back.
requeue() {
    if ((start >= requeues)); then
        echo "error: $1; requeued $start times already, and cluster.requeues allows no more" >&2
    elif [[ $(squeue --noheader --format=%T --jobs="$job") != RUNNING ]]; then
        echo "error: $1; the job is being ended, so it is not requeued" >&2
    else
        echo "$1: requeue $((start + 1)) of at most $requeues"
        scontrol requeue "$job"
        exit
    fi
}
