# SPDX-License-Identifier: GPL-2.0
# The project's commands; the kernel's build reads Kbuild instead. `make help` lists them.

# Picked up by the scripts, from the command line or the environment.
export KDIR KERNEL DEBUG ARCH KUNIT TEST PART SCENARIO ROUNDS QUICK CASES MUTANTS ONLY FROM TO COUNT MINUTES SEED ACTORS PROVE

.PHONY: all kernel demo test fuzz soak bench lint selftests faults ground cycles clean help

all:
	+@scripts/build >/dev/null

kernel:
	@scripts/kernel

demo:
	@scripts/demo

test:
	@scripts/test

fuzz:
	@scripts/fuzz

soak:
	@scripts/soak

bench:
	@scripts/bench

lint:
	@scripts/lint

selftests:
	@scripts/selftests

faults:
	@scripts/faults

ground:
	@PART=ground scripts/test

cycles:
	@scripts/cycles

clean:
	rm -rf build ksm_rs.ko tests/target bench/target fuzz/target

help:
	@echo "make            build ksm_rs.ko against KDIR (default: the cached test kernel); KUNIT=1: with its KUnit tests"
	@echo "make kernel     build the test kernel into the cache, once; DEBUG=1: KASAN and lockdep; ARCH=um: native"
	@echo "make demo       boot a VM, start QEMU guests in it and watch ksm_rs merge their memory"
	@echo "make test       run the tests in VMs; TEST=words: end-to-end tests with these in their names; PART=kunit|e2e|selftests, and not by itself: races|ground"
	@echo "make fuzz       try what the module parses with random input, on the host; CASES=4096; MUTANTS=1: that it finds what is broken"
	@echo "make soak       try to break it on the debug kernel: MINUTES=30, SEED= repeats a run, ACTORS=names,groups; PROVE=1; DEBUG=0"
	@echo "make bench      measure against the kernel's own KSM, natively; SCENARIO=, ROUNDS=5; QUICK=1: two minutes, to see that it works"
	@echo "make lint       check formatting, clippy, shellcheck, where unsafe code may stand, and the reference"
	@echo "make selftests  run the kernel's own selftests without the module and with it, and compare"
	@echo "make faults     make every memory allocation of the module fail once, each in a life of its own; ONLY=, FROM=, TO="
	@echo "make ground     a life of the module on other grounds: THP, NUMA, CPUs, page tables, slabs, poisoning, little memory"
	@echo "make cycles     load and unload the module COUNT=1000 times under load; DEBUG=1"
	@echo "make clean      remove what was built here; the cache with the kernels stays"
	@echo "make help       this list"
	@echo "                KERNEL=7.2: on that kernel series; DEBUG=1: on the kernel with KASAN and lockdep"
	@echo "scripts/vm      run a command in the test VM with the module loaded; scripts/vm --help"
