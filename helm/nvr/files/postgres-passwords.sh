#!/bin/sh
# Before the server starts: a volume that exists already is given the passwords that are in force now. They may be new:
# a release that was uninstalled leaves its volume and no secret.
set -eu
[ -s "$PGDATA/PG_VERSION" ] || exit 0
quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"; }
# One user, no network; of a statement that fails, nothing is logged that would tell a password.
{
    echo "ALTER ROLE postgres PASSWORD $(quoted "$POSTGRES_PASSWORD")"
    echo "ALTER ROLE airflow PASSWORD $(quoted "$AIRFLOW_DB_PASSWORD")"
    echo "ALTER ROLE mlflow PASSWORD $(quoted "$MLFLOW_DB_PASSWORD")"
} | postgres --single -D "$PGDATA" -c log_min_error_statement=panic -c log_statement=none postgres >/dev/null \
    || echo "could not set the passwords of $PGDATA; the reason is above" >&2
