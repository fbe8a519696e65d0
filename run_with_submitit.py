"""Runs main.py on one or several Slurm nodes through submitit (pip install submitit).

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --job_dir /shared/runs/small \\
        --config configs/published_small_3bit.yaml --data-path /path/to/imagenet

Flags that --help does not list go to main.py. --job_dir must be visible to all nodes; it holds checkpoints and logs.
A job that Slurm preempts, or whose time runs out, is queued again and continues from its last checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import main as training
from console.parser import Parser, file_path
from training.flags import few, positive_int
from utils import UserError, entry_point


class Job:
    """What submitit pickles and calls in every task."""

    def __init__(self, flags: list[str]) -> None:
        self.flags = flags

    def __call__(self) -> None:
        status = training.main(self.flags)
        if status:
            raise SystemExit(status)

    def checkpoint(self) -> Any:
        """Called by submitit before Slurm ends the job: what to queue in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job([*self.flags, '--resume', 'auto']))


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the job, and those of main.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--ngpus', default=8, type=few, help='GPUs, and processes, of a node')
    parser.add_argument('--nodes', default=1, type=positive_int)
    parser.add_argument('--cpus-per-task', default=10, type=few)
    parser.add_argument('--timeout', default=4320, type=positive_int, help='minutes')
    parser.add_argument('--job_dir', default='slurm_job', type=file_path, help='folder of checkpoints and logs')
    parser.add_argument('--job-name', default='q-vit')
    parser.add_argument('--partition')
    parser.add_argument('--account')
    parser.add_argument('--constraint', help='as for sbatch')
    parser.add_argument('--comment')
    return parser.parse_known_args(argv)


@entry_point
def submit(argv: Sequence[str] | None = None) -> None:
    """Queues the job; returns the exit status."""
    args, flags = parse_args(argv)
    training.parse_args(flags)  # main.py checks the rest where it runs: this node may have no GPU
    try:
        import submitit
    except ImportError as error:
        raise UserError('submitit is not installed: pip install submitit') from error
    job_dir = args.job_dir.resolve()
    executor = submitit.AutoExecutor(folder=job_dir / 'slurm_%j', slurm_max_num_timeout=30)
    optional = {f'slurm_{name}': getattr(args, name) for name in ('partition', 'account', 'constraint', 'comment')
                if getattr(args, name) is not None}
    executor.update_parameters(
        name=args.job_name, nodes=args.nodes, tasks_per_node=args.ngpus, gpus_per_node=args.ngpus,
        cpus_per_task=args.cpus_per_task, timeout_min=args.timeout, slurm_signal_delay_s=120, **optional)
    job = executor.submit(Job([*flags, '--output_dir', str(job_dir)]))
    print(f'job {job.job_id}, checkpoints and logs in {job_dir}')


if __name__ == '__main__':
    sys.exit(submit())
