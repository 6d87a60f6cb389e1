# make              builds train_sessa
# make train        builds, fetches the data, trains the default model, samples from it; ARGS="--layers 2": options
# make test         builds and runs every test that needs no GPU
# make train_sessacu testcu    the program for a GPU, and its tests; needs nvcc
# make test_emulated the GPU's tests without one, on the CPU thread by thread; needs g++ and python3
# make influence    builds dev/claims/influence.c
# make page         builds sessa.html, the program in a browser; needs emscripten (apt install emscripten)
# make clean        removes what was built
#
# Variables: CC, CXX, CFLAGS, OPENMP= (for one thread), ARCH (native; x86-64-v3 for valgrind), NVCC, CUDA_ARCH,
# NCCL (the folder of nccl.h; NCCL= for one GPU)

# What the compiler takes is asked once, when something is built: at its first use such a variable becomes the answer.
#
# OpenMP as gcc and clang have it, or as Apple's clang has it with the libomp of Homebrew or MacPorts; else none.
# What is built with it must run: a library that only the linker finds is none. (126: for another processor.)
MACPORTS = /opt/local
ASK_OPENMP = \
	d=`mktemp -d` && trap 'rm -rf $$d' EXIT && \
	echo 'int main(void) { return omp_get_max_threads() < 1; }' >$$d/a.c && \
	runs() { $$d/a; test $$? -eq 0 -o $$? -eq 126; } && \
	try() { { $(CC) -include omp.h $$d/a.c "$$@" -o $$d/a && runs; } >/dev/null 2>&1 && echo "$$@"; } && { \
		try -fopenmp || \
		try -Xpreprocessor -fopenmp -lomp || \
		try -Xpreprocessor -fopenmp -I$(MACPORTS)/include/libomp -L$(MACPORTS)/lib/libomp -lomp || \
		for brew in /opt/homebrew/opt/libomp /usr/local/opt/libomp `brew --prefix libomp 2>/dev/null`; do \
			try -Xpreprocessor -fopenmp -I$$brew/include -L$$brew/lib -lomp && break; \
		done; \
	}
ONE_THREAD = $(CC) has no OpenMP: built for one thread. For more: brew install libomp (macOS), CC=gcc; then make clean
NO_COMPILER = no $(CC) here: apt install gcc libc6-dev (Debian, Ubuntu), xcode-select --install (macOS), or another CC=
TELL = $(if $(shell command -v $(firstword $(CC))),$(info $(ONE_THREAD)),$(error $(NO_COMPILER)))
OPENMP ?= $(eval OPENMP := $(shell $(ASK_OPENMP)))$(if $(OPENMP),,$(TELL))$(OPENMP)

# the processor's own instructions; some compilers say -mcpu, some neither
ARCH ?= native
ASK_NATIVE = d=`mktemp -d` && trap 'rm -rf $$d' EXIT && echo 'int main(void) { return 0; }' >$$d/a.c && \
	for flag in -march=native -mcpu=native; do \
		test -z "`$(CC) $$flag -c $$d/a.c -o $$d/a.o 2>&1 || echo refused`" && echo $$flag && break; \
	done
NATIVE = $(eval NATIVE := $(shell $(ASK_NATIVE)))$(NATIVE)

# CFLAGS of the environment are those of other programs, and slow; make CFLAGS=... rules
CFLAGS = -O3 $(if $(filter native,$(ARCH)),$(NATIVE),-march=$(ARCH)) -ffast-math -fno-finite-math-only
WARNINGS = -Wall -Wextra -Wno-unknown-pragmas
LDLIBS = -lm
COMPILE = $(CC) $(CFLAGS) $(WARNINGS) $< $(OPENMP) -o $@ $(LDLIBS)
CAN_WRITE = @test -w . || test -w $@ || { echo "$@: this folder is read-only, build in a copy of it" >&2; exit 1; }

.PHONY: all help train test testcu test_emulated emulated_sessacu emulated_shapes emulated_itself emulated_ranks
.PHONY: page clean

all: train_sessa

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

train_sessa: train_sessa.c
	$(CAN_WRITE)
	$(COMPILE)

test_sessa: test_sessa.c dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE)

# the same test in float64, where central differences check every gradient
test_sessa64: test_sessa.c dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE) -DREAL=double

# the program as a user runs it, in both; its files
test_runs: dev/trust/test_runs.c dev/trust/run.h dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE)

test_runs64: dev/trust/test_runs.c dev/trust/run.h dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE) -DREAL=double

test_files: dev/trust/test_files.c dev/trust/run.h dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE)

# several processes that train together; they are Linux's
RANKS = $(if $(filter Linux,$(shell uname)),test_ranks)
test_ranks: dev/trust/test_ranks.c $(wildcard dev/ranks/*.h) dev/trust/run.h dev/trust/check.h train_sessa.c
	$(CAN_WRITE)
	$(COMPILE) -pthread

# how far back a layer reaches (dev/claims/claims.md)
influence: dev/claims/influence.c train_sessa.c
	$(CAN_WRITE)
	$(COMPILE)

# the program in a browser: one file that opens from disk (dev/page/README.md)
page:
	$(CAN_WRITE)
	@sh data/tinyshakespeare.sh && text=data/tinyshakespeare.txt || text=train_sessa.c; \
	python3 dev/page/build.py --text $$text --out sessa.html

# CUDA (13.0 was compiled, others are untried): nvcc from its usual place if it is not on the path, the card's own
# architecture where there is one
USUAL_NVCC = $(firstword $(wildcard /usr/local/cuda/bin/nvcc /opt/cuda/bin/nvcc) nvcc)
NVCC ?= $(or $(shell command -v nvcc 2>/dev/null),$(USUAL_NVCC))
CUDA_ARCH ?= $(or $(subst sm_90,sm_90a,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\.\([0-9]*\).*/sm_\1\2/p')),sm_90a)
NVCCFLAGS ?= -O3 --extended-lambda -gencode arch=$(subst sm_,compute_,$(CUDA_ARCH)),code=$(CUDA_ARCH) -diag-suppress 1675 -Xcompiler "$(CFLAGS) $(OPENMP) $(WARNINGS)"

# NCCL, for several GPUs: the folder of nccl.h, as a package or PyTorch brings it. The library is looked for when
# the program runs. NCCL= builds without, for one GPU.
ASK_NCCL = for folder in $(dir $(abspath $(shell command -v $(NVCC))))../include /usr/include /usr/local/include \
		/usr/local/cuda/include /opt/cuda/include \
		`python3 -c 'import nvidia.nccl as n; print(list(n.__path__)[0] + "/include")' 2>/dev/null`; do \
	test -f $$folder/nccl.h && echo $$folder && break; \
	done
NCCL ?= $(eval NCCL := $(shell $(ASK_NCCL)))$(NCCL)

# The twin, and what makes it fast; PLAIN=1 leaves that out, and several GPUs.
TWIN = train_sessa.cu train_sessa.c $(wildcard dev/cuda/*.cuh) $(wildcard dev/ranks/*.h dev/ranks/*.cuh)
NVCC_TWIN = $(NVCC) $(NVCCFLAGS) $(if $(PLAIN),-DSESSA_PLAIN,$(if $(NCCL),-DSESSA_NCCL -I$(NCCL)))

train_sessacu: $(TWIN)
	$(NVCC_TWIN) $< -o $@ -lcublasLt

test_sessacu: test_sessa.c dev/trust/check.h $(TWIN)
	$(NVCC_TWIN) -DTEST_CUDA -x cu $< -o $@ -lcublasLt

test_kernels: dev/trust/test_kernels.cu dev/trust/check.h dev/trust/guard.cuh $(TWIN)
	$(NVCC) $(NVCCFLAGS) $< -o $@ -lcublasLt

# the same, but now and then a warp comes late to a barrier: what holds only among quick ones stands still
test_late: dev/trust/test_kernels.cu dev/trust/check.h dev/trust/guard.cuh $(TWIN)
	$(NVCC) $(NVCCFLAGS) -DLATE_WARPS $< -o $@ -lcublasLt

# random shapes, and the branches that they meet: ./test_shapes SEED FIRST COUNT
test_shapes: dev/trust/test_shapes.cu dev/trust/guard.cuh $(TWIN)
	$(NVCC) $(NVCCFLAGS) $< -o $@ -lcublasLt

testcu: test_sessacu test_kernels test_late test_shapes test_runs $(RANKS) train_sessacu
	./test_sessacu
	./test_kernels
	timeout -k 5 300 ./test_late tiles
	./test_runs ./test_sessacu
	$(if $(RANKS),./test_ranks ./test_sessacu shared)
	./test_shapes 1 0 300

# The same tests on a machine without a GPU, the kernels' threads on the CPU (dev/trust/trust.md, "Without a GPU").
EMULATE = dev/trust/emulate
EMULATED_SOURCES = $(TWIN) test_sessa.c $(wildcard dev/trust/*.cu dev/trust/*.cuh) dev/trust/check.h \
	$(wildcard $(EMULATE)/*)
EMULATED_FLAGS = -std=c++17 -O1 $(NATIVE) -fno-strict-aliasing $(OPENMP) \
	$(WARNINGS) $(if $(SANITIZE),-g -fsanitize=$(SANITIZE)) \
	-Wno-unknown-pragmas -Wno-sign-compare -Wno-unused-parameter -Wno-unused-function -I $(EMULATE) -I . -I dev/trust
# on a card with 99 KiB of shared memory a block
EMULATED_RUN = OMP_NUM_THREADS=1

emulated/prepared: $(EMULATED_SOURCES)
	$(CAN_WRITE)
	mkdir -p emulated
	python3 $(EMULATE)/prepare.py emulated
	touch $@

emulated/test_kernels emulated/test_shapes: emulated/%: emulated/prepared
	$(CXX) $(EMULATED_FLAGS) -x c++ emulated/dev/trust/$*.cu -o $@

emulated/test_emulate: emulated/prepared
	$(CXX) $(EMULATED_FLAGS) -x c++ emulated/$(EMULATE)/test_emulate.cu -o $@

emulated/test_sessacu: emulated/prepared
	$(CXX) $(EMULATED_FLAGS) $(if $(PLAIN),-DSESSA_PLAIN,-DSESSA_NCCL) -DTEST_CUDA -x c++ emulated/test_sessa.c -o $@ -pthread

emulated/train_sessacu: emulated/prepared
	$(CXX) $(EMULATED_FLAGS) $(if $(PLAIN),-DSESSA_PLAIN,-DSESSA_NCCL) -x c++ emulated/train_sessa.cu -o $@ -pthread

test_emulated: emulated_sessacu emulated_shapes emulated_itself $(if $(RANKS),emulated_ranks)
emulated_sessacu: emulated/test_sessacu
	$(EMULATED_RUN) emulated/test_sessacu
emulated_shapes: emulated/test_shapes
	$(EMULATED_RUN) emulated/test_shapes 1 0 36 small
emulated_itself: emulated/test_emulate
	emulated/test_emulate
emulated_ranks: emulated/test_sessacu test_ranks
	EMULATE_DEVICES=4 $(EMULATED_RUN) ./test_ranks emulated/test_sessacu nccl short

# ARGS: options of train_sessa. Without any, a run of the same settings and data is made again and replaces the
# one that is there; with some, nothing is replaced unless they say --overwrite. What they name as --out or
# --resume is sampled from.
train: train_sessa
	@set -- $(ARGS); again=--again; out=; run=; data=; before=; \
	for word; do \
		again=; \
		case $$before in --out) out=$$word;; --resume) run=$$word;; --data) data=$$word;; esac; \
		case $$word in --out=*) out=$${word#*=};; --resume=*) run=$${word#*=};; --data=*) data=$${word#*=};; esac; \
		before=$$word; \
	done; \
	if [ -z "$$data$$run" ]; then \
		if sh data/tinyshakespeare.sh; then data=data/tinyshakespeare.txt; \
		else echo "training on train_sessa.c instead"; data=train_sessa.c; fi; \
		set -- --data $$data $$again "$$@"; \
	fi; \
	out=$${out:-$${run:-sessa.safetensors}}; \
	./train_sessa "$$@" && echo && \
	./train_sessa --load "$${out%.safetensors}.best.safetensors" --generate 500 --temperature 0.8

test: test_sessa64 test_sessa test_runs64 test_runs test_files $(RANKS) train_sessa
	./test_sessa64
	./test_sessa
	./test_runs64
	./test_runs
	./test_files
	$(if $(RANKS),./test_ranks)

clean:
	rm -f train_sessa test_sessa test_sessa64 test_runs test_runs64 test_files test_ranks influence sessa.html
	rm -f train_sessacu test_sessacu test_kernels test_late test_shapes
	rm -rf emulated
