"""macOS and Windows by simulation: what they lack is taken away, and a run is stopped, resumed and deployed."""
import re
import subprocess
import sys

import pytest
from helpers import ROOT, TINY

MISSING = {
    'macos': "del signal.sigwaitinfo, os.sched_getaffinity",
    'windows': '''
set_blocking, set_wakeup_fd = os.set_blocking, signal.set_wakeup_fd
def set_wakeup_fd_of_any_mode(descriptor, **options):
    if descriptor >= 0:
        set_blocking(descriptor, False)  # which Linux asks for
    return set_wakeup_fd(descriptor, **options)
signal.set_wakeup_fd = set_wakeup_fd_of_any_mode
del signal.sigwaitinfo, signal.alarm, signal.pthread_sigmask, os.set_blocking, os.getuid
del os.O_NONBLOCK, os.sched_getaffinity, os.register_at_fork, os.pread, os.pwrite
sys.modules['fcntl'] = sys.modules['resource'] = None
load, flush = ctypes.CDLL, os.fsync
def load_by_name(name, *args, **options):
    if name is None:
        raise TypeError('bad argument type for built-in operation')
    return load(name, *args, **options)
def flush_what_may_be_written(descriptor):
    import stat
    access = linux_flags(descriptor, 3) & os.O_ACCMODE
    if stat.S_ISDIR(os.fstat(descriptor).st_mode) or access == os.O_RDONLY:
        raise OSError(9, 'Bad file descriptor')
    flush(descriptor)
ctypes.CDLL, os.fsync = load_by_name, flush_what_may_be_written
'''}


@pytest.mark.whole_run
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != 'linux', reason='takes away from Linux what others lack')
@pytest.mark.parametrize('system', MISSING)
def test_a_run_where_much_is_missing(system, tmp_path):
    """Without TensorBoard, too. What data-loading workers get can be pickled, since they are started anew there."""
    flags = [str(flag) for flag in (*TINY, '--output_dir', tmp_path, '--print-freq', 100)]
    program = f'''
import ctypes, os, pickle, signal, sys
from fcntl import fcntl as linux_flags
import numpy, torch
sys.modules['tensorboard'] = None
{MISSING[system]}
import main, deploy, cost, visualize, soft_labels, model_card, hubconf
loaders = []
for part in ('train', 'eval'):
    build = getattr(main.data, f'build_{{part}}_loader')
    def build_and_pickle(dataset, *args, build=build):
        pickle.dumps((dataset, main.data.outlive_signals))
        loaders.append(dataset)
        return build(dataset, *args)
    setattr(main.data, f'build_{{part}}_loader', build_and_pickle)
flags = {flags!r}
stop, update = [6], main.build_training.__globals__['Training'].update
def update_and_stop(self, *args):
    update(self, *args)
    stop[0] -= 1
    if not stop[0]:
        signal.raise_signal(signal.SIGTERM)
main.build_training.__globals__['Training'].update = update_and_stop
assert main.main([*flags, '--epochs', '1']) == 143
assert main.main([*flags, '--epochs', '1', '--resume', 'auto']) == 0
assert len(loaders) == 4
checkpoint = {str(tmp_path / "checkpoint.pth")!r}
assert deploy.main(['pack', checkpoint]) == 0
assert deploy.main(['eval', checkpoint.replace('.pth', '.qvit.safetensors'), '--num_workers', '0']) == 0
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r'\* Acc@1', done.stdout)) == 2
    assert 'TensorBoard is not installed' in done.stdout and 'Traceback' not in done.stderr
