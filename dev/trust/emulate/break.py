"""Whether the twin's tests on the CPU find what they are for: faults of the kind that a GPU shows only
sometimes are put into copies of the twin, one after the other, and each must make test_shapes fail.

  dev/trust/emulate/break.py [NUMBER ...]      about a minute each
"""
import os
import shutil
import subprocess
import sys
import tempfile

TOP = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
SUM = """    x = warp_sum(x);
    __syncthreads();
"""
ROW_SUM = "    barrier_sync(threadIdx.y + 1, blockDim.x);\n"
MERGE = """    for (int r = 0; r < H / 16; r++) write_some<4>(&A[row + r][col], left[r]);
    __syncthreads();
"""
SOFTMAX = """        if (j < end) *(float4 *)v = *(const float4 *)(row + j);
        __syncthreads();
        for (int i = 0; i < 4; i++) {
"""
DECODE = """    begin(vec, shared);
    __syncthreads();
"""

# what it is, the file, what stands there, what comes in its place, shapes FIRST and COUNT
FAULTS = [
    ("block_sum without its first barrier: the numbers of the sum before are still read", "train_sessa.cu",
     SUM, SUM.replace("    __syncthreads();\n", ""), 0, 18),
    ("row_sum without its barrier", "train_sessa.cu", ROW_SUM, "", 0, 18),
    ("softmax in place without the barrier between reading and writing", "train_sessa.cu", SOFTMAX,
     SOFTMAX.replace("        __syncthreads();\n", ""), 0, 18),
    ("merge_seeds without the barrier behind its first product", "dev/cuda/feedback.cuh", MERGE,
     MERGE.replace("    __syncthreads();\n", ""), 0, 9),
    ("the scan's copies not waited for", "dev/cuda/scan.cuh", "        copy_async_wait_all();\n", "", 0, 18),
    ("the scan's chunk before not waited for", "dev/cuda/scan.cuh",
     "        __syncthreads(); // the chunk before is done\n", "", 0, 36),
    ("the decoder's row read before it is there", "dev/cuda/decode.cuh", DECODE,
     DECODE.replace("    __syncthreads();\n", ""), 27, 9),
    ("a product beside the others not waited for, in the streams", "train_sessa.cu",
     "    join(W_OUT_GRADIENT);\n", "", 0, 36),
    ("a product begins beside before its operand is there", "dev/cuda/schedule.cuh",
     "    follow(stream_of(branch), gpu.stream);\n", "", 0, 18),
    ("an mma's operand from the next columns", "dev/cuda/scan.cuh", "right[2] = {v[0], v[2]};",
     "right[2] = {v[0], v[1]};", 0, 18),
]


def copy_of_tree(into):
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=TOP,
                            stdout=subprocess.PIPE, check=True)
    for name in listed.stdout.decode().split("\n"):
        if name and os.path.isfile(os.path.join(TOP, name)) and not name.startswith("data/"):
            os.makedirs(os.path.dirname(os.path.join(into, name)), exist_ok=True)
            shutil.copy(os.path.join(TOP, name), os.path.join(into, name))


def seen(fault):
    name, file, old, new, first, count = fault
    with tempfile.TemporaryDirectory() as folder:
        copy_of_tree(folder)
        path = os.path.join(folder, file)
        with open(path) as source:
            text = source.read()
        if text.count(old) != 1:
            return "it stands there %d times" % text.count(old)
        with open(path, "w") as source:
            source.write(text.replace(old, new))
        built = subprocess.run(["make", "emulated/test_shapes"], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        if built.returncode:
            return "it does not compile: " + built.stdout.decode()[-1000:]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        run = subprocess.run(["emulated/test_shapes", "1", str(first), str(count), "small"], cwd=folder,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        lines = [line for line in run.stdout.decode().split("\n") if line]
        failing = [line for line in lines if line.startswith("FAIL")] or lines[-1:]
        print("        " + failing[0][:160])
        return None if run.returncode else "not seen"


def main(numbers):
    failed = 0
    for i in [int(n) for n in numbers] or range(len(FAULTS)):
        problem = seen(FAULTS[i])
        end = ": " + problem if problem else ""
        print("%-6s%s%s" % ("FAIL" if problem else "ok", FAULTS[i][0], end), flush=True)
        failed += problem is not None
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
