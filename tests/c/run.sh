#!/bin/sh
# run.sh: builds csrc as a plain C library and runs the driver and the pool's test over it.
# Knows a C compiler alone, no Python; leaves nothing behind. CC and CFLAGS from the environment.
# Usage: tests/c/run.sh [plain] [asan] [tsan] [valgrind] [aarch64]; asan and tsan if none is named.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build DIR COMPILER FLAGS: DIR/driver and DIR/pool_test, two compilers at a time.
build() {
    dir=$work/$1 compiler=$2 flags="-std=gnu11 -g -ffp-contract=off -pthread $3 ${CFLAGS:-}"
    mkdir -p "$dir"
    {
        for source in "$root"/csrc/*.c "$root"/csrc/isa/*.c "$here"/driver.c; do
            echo "$source $dir/$(basename "$source" .c).o"
        done
        # The test makes the pool's threads fail to start.
        echo "$root/csrc/pool.c $dir/pool_testable.o -Dpthread_create=pool_test_pthread_create"
        echo "$here/pool_test.c $dir/pool_test.o"
    } | xargs -P 2 -L 1 sh -c "$compiler"' '"$flags"' -Wall -Wextra -c "$0" -o "$1" $2'
    kernels=$(ls "$dir"/*_f32.o "$dir"/*_f64.o)
    $compiler $flags "$dir/driver.o" "$dir/dispatch.o" "$dir/pool.o" "$dir/wavefront.o" $kernels -o "$dir/driver" -lm
    $compiler $flags "$dir/pool_test.o" "$dir/pool_testable.o" -o "$dir/pool_test" -lm
}

run() {
    echo "== $*" | sed "s|$work/||g"
    "$@"
}

[ $# -gt 0 ] || set -- asan tsan
for what in "$@"; do
    case $what in
        plain)
            build plain "${CC:-cc}" "-O3"
            run "$work/plain/pool_test"
            run "$work/plain/driver"
            run "$work/plain/pool_test" time
            ;;
        asan)
            build asan "${CC:-cc}" \
                "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
            export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
            run "$work/asan/pool_test" 20000
            run "$work/asan/driver"
            ;;
        tsan)
            build tsan "${CC:-cc}" "-O1 -fsanitize=thread"
            export TSAN_OPTIONS=halt_on_error=1
            run "$work/tsan/pool_test" 20000 nofork # TSan follows no fork of several threads
            # A third of large: thread by thread it is the same walk for each cell.
            run "$work/tsan/driver" quick large concurrent poll waves loops base
            ;;
        valgrind) # 3.19 knows no AVX-512, and hides it; nor denormals as zero, of the pool's test
            build valgrind "${CC:-cc}" "-O1"
            run valgrind -q --error-exitcode=1 --leak-check=full --show-leak-kinds=definite \
                --errors-for-leak-kinds=definite \
                "$work/valgrind/driver" quick small concurrent tables waves loops
            ;;
        aarch64)
            build aarch64 "${CC_AARCH64:-aarch64-linux-gnu-gcc}" "-O2 -static"
            # nofork: qemu 7.2 itself fails where the child of several threads makes a thread.
            run qemu-aarch64 "$work/aarch64/pool_test" 2000 nofork
            run qemu-aarch64 "$work/aarch64/driver" quick tables small large concurrent waves loops
            ;;
        *)
            echo "run.sh: $what is none of plain, asan, tsan, valgrind, aarch64" >&2
            exit 2
            ;;
    esac
done
