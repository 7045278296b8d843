# PATH need not know where the program is: in the virtual environment, or in Debian's folder of nginx
program=@PROGRAM@
command -v "$program" > /dev/null || for bin in "$here/../venv/bin" @PREFIX@/venv/bin /usr/local/sbin /usr/sbin; do
  if [ -x "$bin/$program" ]; then PATH="$bin:$PATH"; export PATH; break; fi
done
command -v "$program" > /dev/null || {
  echo "$0: $program is not on PATH, nor in $here/../venv/bin, @PREFIX@/venv/bin, /usr/local/sbin, /usr/sbin" >&2
  exit 127
}
