# shellcheck shell=bash disable=SC2034 # what is set here is used by those who source it
# Shared by the scripts beside it: where things are cached, how to speak, how to find the tools.
# Sourced, never run.

set -euo pipefail

# The Makefile exports its switches, given or not; the kernel's own takes an empty ARCH for an architecture.
[ -n "${ARCH:-}" ] || unset ARCH

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${KSM_RS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ksm_rs}
tools=$cache/tools
jobs=$(nproc)

say() { printf '%s\n' "ksm_rs: $*" >&2; }
die() {
    say "error: $*"
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command, keeping its output in a log that is shown only when the command fails.
quietly() {
    local log=$1
    shift
    mkdir -p "$(dirname "$log")"
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        die "failed: $* (whole log: $log)"
    fi
}

# The same for a command whose standard output is wanted; only its standard error goes to the log.
quietly_out() {
    local log=$1
    shift
    mkdir -p "$(dirname "$log")"
    if ! "$@" 2>"$log" </dev/null; then
        tail -n 40 "$log" >&2
        die "failed: $* (whole log: $log)"
    fi
}

# Two commands, perhaps of two checkouts, may want the same thing of the cache at the same time.
lock_cache() {
    mkdir -p "$cache/lock"
    exec {lock_fd}>"$cache/lock/$1"
    flock -n "$lock_fd" || {
        say "waiting for another command that prepares $1 in $cache"
        flock "$lock_fd"
    }
}

unlock_cache() { exec {lock_fd}>&-; }

# Path of libclang's folder; bindgen needs 17 or newer to understand the kernel's headers.
libclang_dir() {
    local dir version
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        echo "$LIBCLANG_PATH"
        return
    fi
    for version in 21 20 19 18 17; do
        for dir in "/usr/lib/llvm-$version/lib" "/usr/lib64/llvm$version/lib" "/usr/lib/llvm$version/lib"; do
            if compgen -G "$dir/libclang*.so*" >/dev/null; then
                echo "$dir"
                return
            fi
        done
    done
    for dir in /usr/lib64 /usr/lib; do
        if compgen -G "$dir/libclang.so.*" >/dev/null; then
            echo "$dir"
            return
        fi
    done
    return 1
}

# The kernel compiles Rust's `core` itself, from the source that belongs to this very rustc.
rust_lib_src() {
    local version dir
    version=$(rustc_version)
    for dir in "$(rustc --print sysroot)/lib/rustlib/src/rust/library" \
        "/usr/src/rustc-$version/library" \
        "$cache/rust-src/$version/usr/src/rustc-$version/library"; do
        if [ -f "$dir/core/src/lib.rs" ]; then
            echo "$dir"
            return
        fi
    done
    return 1
}

rustc_version() { rustc --version | cut -d' ' -f2; }

# True if version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Puts the project's own tools on PATH and tells the kernel's Makefiles where Rust's source and libclang are.
use_tools() {
    export PATH="$tools/bin:$PATH"
    [ -d "$tools/rust" ] && export PATH="$tools/rust:$PATH"
    LIBCLANG_PATH=$(libclang_dir) && export LIBCLANG_PATH
    RUST_LIB_SRC=$(rust_lib_src) && export RUST_LIB_SRC
    return 0
}

# Name of the kernel flavour that the switches DEBUG=1 and ARCH=um of the Makefile select.
flavour() {
    if [ "${ARCH:-}" = um ]; then
        echo um
    elif [ "${DEBUG:-0}" = 1 ]; then
        echo debug
    else
        echo release
    fi
}

series() { echo "${KERNEL:-7.3}"; }

# The link that scripts/kernel keeps pointed at the newest build of a series and flavour.
kernel_link() { echo "$cache/kernel/$(series)-$(flavour)"; }

# The switches, as somebody would type them after `make`, with a blank behind.
kernel_words() {
    case $(flavour) in
        um) echo "ARCH=um " ;;
        debug) echo "DEBUG=1 " ;;
        release) ;;
    esac
}

# Words that make the kernel's build use the compiler and architecture of the flavour.
kernel_make_words() {
    case $(flavour) in
        um) echo "ARCH=um" ;;
        debug) echo "LLVM=-19" ;;
        release) ;;
    esac
}

# Builds the programs of tests/ and prints the path of the one of this name.
test_binary() {
    local binary
    binary=$(CARGO_TARGET_DIR=$top/build/tests cargo test --quiet --locked --no-run --message-format=json \
        --manifest-path "$top/tests/Cargo.toml" --test "$1" |
        python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == sys.argv[1]: print(message["executable"])' "$1")
    [ -n "$binary" ] || die "tests/$1 was not built"
    echo "$binary"
}
