#!/bin/sh
# Makes the secrets that are not there yet in ./secrets; certificate and key (fullchain.pem, privkey.pem) are yours to put there.
#
# The folder keeps everybody else out; the files in it may be read by all because each container reads them as a user of its own.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets keys
chmod 700 secrets

word() { head -c 24 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n'; }
have() { [ -s "secrets/$1" ]; }

have postgres_password || word >secrets/postgres_password
have database_url || printf 'postgresql://portico:%s@postgres/portico\n' "$(cat secrets/postgres_password)" >secrets/database_url
have valkey.conf || printf 'requirepass %s\n' "$(word)" >secrets/valkey.conf
have redis_url || printf 'redis://default:%s@valkey/0\n' "$(sed 's/^requirepass //' secrets/valkey.conf)" >secrets/redis_url
have master_key || head -c 32 /dev/urandom | base64 | tr '+/' '-_' >secrets/master_key
chmod 444 secrets/*
# `portico admin init` writes here as the user of the image.
chown 10001:10001 keys 2>/dev/null || echo "run as root: chown 10001:10001 $(pwd)/keys" >&2
