#define SESSA_NO_MAIN
#include "../../train_sessa.c"
#include "../ranks/shared.h"
int main(int argc, char **argv) { start_again(argv); return run_in_ranks(argc, argv, &cpu_backend, ranks_backend); }
