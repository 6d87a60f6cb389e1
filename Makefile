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

# random shapes, and the branches that they meet: ./test_shapes SEED FIRST COUNT
test_shapes: dev/test_shapes.cu train_sessa.cu train_sessa.c
	$(NVCC) $(NVCCFLAGS) $< -o $@ -lcublasLt

testcu: test_sessacu test_shapes train_sessacu
	./test_sessacu
	./test_shapes 1 0 300

train: train_sessa
	@if sh data/tinyshakespeare.sh; then text=data/tinyshakespeare.txt; \
	else echo "training on train_sessa.c instead"; text=train_sessa.c; fi; \
	./train_sessa --data $$text $(ARGS) && \
	echo && ./train_sessa --load sessa.best.safetensors --generate 500 --temperature 0.8

test: test_sessa test_sessa64 train_sessa
	./test_sessa64
	./test_sessa

clean:
	rm -f train_sessa test_sessa test_sessa64 influence train_sessacu test_sessacu test_shapes
