#!/bin/sh
# Makes what a secured service needs, in a folder: sh cluster/certificates.sh secrets NAME_OR_IP...
#   ca.crt ca.key   an authority of your own; ca.key stays here
#   tls.crt tls.key the servers' certificate, for the names and addresses given and for loopback
#   token           what callers send, one line per role: give clients the line of "generate" only
#   ray-token       what Ray's own processes send each other
# What is there already is kept, so that a second run with more names makes only the certificate again.
set -eu
folder="$1"; shift
umask 077
mkdir -p "$folder"; cd "$folder"

# s2t.internal is security.server_name of the files here: one certificate for servers of any address.
names="DNS:localhost,DNS:s2t.internal,IP:127.0.0.1"
for name in "$@"; do
  case "$name" in
    *[!0-9.]*) case "$name" in *:*) names="$names,IP:$name" ;; *) names="$names,DNS:$name" ;; esac ;;
    *) names="$names,IP:$name" ;;
  esac
done

[ -f ca.key ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
  -keyout ca.key -out ca.crt -subj "/CN=s2t authority" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout tls.key -out tls.csr -subj "/CN=s2t" 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > tls.ext
openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile tls.ext -out tls.crt 2>/dev/null
rm -f tls.csr tls.ext
[ -f token ] || for role in generate score admin metrics; do echo "$role: $(openssl rand -hex 32)"; done > token
[ -f ray-token ] || openssl rand -hex 32 > ray-token
echo "in $folder: ca.crt tls.crt tls.key token ray-token, for $names"
