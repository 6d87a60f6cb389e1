# make train   builds, fetches the data, trains the default model and samples from it
# make test    builds and runs every test that needs no GPU
# Variables: CC, ARCH (native; x86-64-v3 for valgrind), OPENMP= to build without OpenMP, CUDA_ARCH.

CC ?= cc
ARCH ?= native
OPENMP ?= -fopenmp
WARNINGS = -Wall -Wextra
CFLAGS ?= -O3 -march=$(ARCH) -ffast-math -fno-finite-math-only
LDLIBS = -lm

.PHONY: all train test testcu clean

all: train_sessa

train_sessa: train_sessa.c
	$(CC) $(CFLAGS) $(OPENMP) $(WARNINGS) $< -o $@ $(LDLIBS)

test_sessa: test_sessa.c train_sessa.c
	$(CC) $(CFLAGS) $(OPENMP) $(WARNINGS) $< -o $@ $(LDLIBS)

# the same test in float64, where central differences check every gradient
test_sessa64: test_sessa.c train_sessa.c
	$(CC) $(CFLAGS) $(OPENMP) $(WARNINGS) -DREAL=double $< -o $@ $(LDLIBS)

# how far back a layer reaches (dev/claims.md)
influence: dev/influence.c train_sessa.c
	$(CC) $(CFLAGS) $(OPENMP) $(WARNINGS) $< -o $@ $(LDLIBS)

# CUDA: the card's own architecture where there is one
NVCC ?= nvcc
CUDA_ARCH ?= $(or $(subst sm_90,sm_90a,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9]*\)\.\([0-9]*\).*/sm_\1\2/p')),sm_90a)
NVCCFLAGS ?= -O3 --extended-lambda -gencode arch=$(subst sm_,compute_,$(CUDA_ARCH)),code=$(CUDA_ARCH) -diag-suppress 1675 -Xcompiler "$(CFLAGS) $(OPENMP) $(WARNINGS)"

train_sessacu: train_sessa.cu train_sessa.c
	$(NVCC) $(NVCCFLAGS) $< -o $@ -lcublasLt

test_sessacu: test_sessa.c train_sessa.cu train_sessa.c
	$(NVCC) $(NVCCFLAGS) -DTEST_CUDA -x cu $< -o $@ -lcublasLt

testcu: test_sessacu train_sessacu
	./test_sessacu

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

test: test_sessa test_sessa64 train_sessa
	./test_sessa64
	./test_sessa

clean:
	rm -f train_sessa test_sessa test_sessa64 influence train_sessacu test_sessacu
