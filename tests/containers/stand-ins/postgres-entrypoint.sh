set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    umask 077
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/pw
    initdb --pgdata="$PGDATA" --username=postgres --auth-host=scram-sha-256 --auth-local=trust --pwfile=/tmp/pw \
        --encoding=UTF8 --locale=C.UTF-8 >/dev/null
    rm /tmp/pw
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    pg_ctl --pgdata="$PGDATA" --wait --silent --options="-c listen_addresses=''" start
    for script in /docker-entrypoint-initdb.d/*.sh; do sh "$script"; done
    pg_ctl --pgdata="$PGDATA" --wait --silent --mode=fast stop
fi
exec postgres -c listen_addresses='*'
