/* A team of threads that does nothing; its threads stay with the calling thread until that ends. */
#include <stdint.h>

typedef struct { int64_t threads; } Args;

int hybridnas_open_team(const Args *a) {
    (void)a;
#pragma omp parallel num_threads((int)a->threads)
    { __asm__ volatile(""); } /* not optimised away */
    return 0;
}
