# a virtual environment comes first, so that no other Flower on PATH is started; /usr/sbin is Debian's folder of nginx
program=@PROGRAM@
PATH="$PATH:/usr/local/sbin:/usr/sbin"
for bin in ${FEDKEEL_VENV:+"$FEDKEEL_VENV/bin"} "$here/../venv/bin" @PREFIX@/venv/bin; do
  if [ -x "$bin/$program" ]; then PATH="$bin:$PATH"; break; fi
done
export PATH
command -v "$program" > /dev/null || {
  echo "$0: $program is not in \$FEDKEEL_VENV/bin, $here/../venv/bin or @PREFIX@/venv/bin, nor on PATH or in /usr/local/sbin, /usr/sbin" >&2
  exit 127
}
