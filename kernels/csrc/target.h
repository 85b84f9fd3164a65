// Compile what follows for more than the baseline; the result may only run where the processor has it. Standard headers come
// before it: what they define inline must stay runnable everywhere.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define QL_X86 1
#define QL_PRAGMA(text) _Pragma(#text)
#define QL_INLINE inline __attribute__((always_inline))
#define QL_INLINED __attribute__((always_inline))  // of a lambda
#if defined(__clang__)
#define QL_TARGET_BEGIN(features) \
    QL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define QL_TARGET_END QL_PRAGMA(clang attribute pop)
#else
#define QL_TARGET_BEGIN(features) QL_PRAGMA(GCC push_options) QL_PRAGMA(GCC target(features))
#define QL_TARGET_END QL_PRAGMA(GCC pop_options)
#endif
#define QL_AVX512_BEGIN \
    QL_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,bmi2,fma,f16c")
#else
#define QL_X86 0
#endif
