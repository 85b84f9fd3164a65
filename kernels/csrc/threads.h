// How a product is divided among threads: torch's own OpenMP team.
#pragma once

#include <stdint.h>

// The threads are those that torch has: a second team would spin against the first. Where there is no OpenMP in the
// process, one thread does it all.
#if defined(__GNUC__) && !defined(_WIN32)
extern "C" {
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num(void) __attribute__((weak));
int omp_get_num_threads(void) __attribute__((weak));
}
#define QL_THREADS 1
#else
#define QL_THREADS 0
#endif

namespace quantlab {
namespace {

constexpr int64_t kUnit = 16;              // outputs; threads then write different cache lines
constexpr int64_t kWorthAThread = 1 << 15;  // products: fewer are done before a thread wakes up

template <typename Function>
struct Division {
    const Function *function;
    int64_t count;

    static void part(void *data) {
        const auto &self = *static_cast<const Division *>(data);
#if QL_THREADS
        const int64_t me = omp_get_thread_num(), of = omp_get_num_threads();
#else
        const int64_t me = 0, of = 1;
#endif
        const int64_t units = (self.count + kUnit - 1) / kUnit;
        const int64_t begin = units * me / of * kUnit, end = units * (me + 1) / of * kUnit;
        if (begin < self.count) (*self.function)(begin, end < self.count ? end : self.count);
    }
};

// Calls function(begin, end) for parts of 0..count, each on a thread.
template <typename Function>
void divide(int64_t count, int threads, int64_t work, const Function &function) {
    const int64_t wanted = work / kWorthAThread + 1;
    if (wanted < threads) threads = int(wanted);
#if QL_THREADS
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
        Division<Function> division = {&function, count};
        GOMP_parallel(Division<Function>::part, &division, unsigned(threads), 0);
        return;
    }
#endif
    function(0, count);
}

}  // namespace
}  // namespace quantlab
