/* SPDX-License-Identifier: GPL-2.0 */
/* What lib/kstrtox.c and sysfs_streq() want of the kernel's headers, for a program. */
#ifndef SHIM_H
#define SHIM_H

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef int8_t s8;
typedef uint16_t u16;
typedef int16_t s16;
typedef uint64_t u64;
typedef int64_t s64;

#define noinline __attribute__((noinline))
#define unlikely(condition) (condition)
#define __user
#define EXPORT_SYMBOL(name)
#define min(one, other) ((one) < (other) ? (one) : (other))
#define check_add_overflow(one, other, result) __builtin_add_overflow(one, other, result)
#define check_mul_overflow(one, other, result) __builtin_mul_overflow(one, other, result)
#define copy_from_user(to, from, bytes) (memcpy(to, from, bytes), 0)

static inline u64 int_pow(u64 base, unsigned int exponent)
{
	u64 power = 1;

	while (exponent--)
		power *= base;
	return power;
}

#endif
