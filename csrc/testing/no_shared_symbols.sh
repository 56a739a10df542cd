# The kernels of one instruction set must not define weak symbols: the linker keeps one copy of each for the whole
# library, which could be the one compiled for a processor that this machine does not have.
# Usage: no_shared_symbols.sh NM OBJECT...
nm="$1"
shift
[ $# -gt 0 ] || { echo "no objects given"; exit 1; }
"$nm" -C "$@" | grep " T " >/dev/null || { echo "$nm lists no functions in $*"; exit 1; }
weak=$("$nm" -C "$@" | grep -E " [WVu] " | grep -v "DW.ref.__gxx_personality_v0")
[ -z "$weak" ] || { echo "$weak"; exit 1; }
