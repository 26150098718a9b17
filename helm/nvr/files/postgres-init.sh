#!/bin/sh
# Run by the image of PostgreSQL once, on an empty data folder: a database and an owner for Airflow, and for MLflow.
set -eu
for name in airflow mlflow; do
    case "$name" in
        airflow) password=$AIRFLOW_DB_PASSWORD ;;
        mlflow) password=$MLFLOW_DB_PASSWORD ;;
    esac
    psql --quiet --username "${POSTGRES_USER:-postgres}" --set ON_ERROR_STOP=1 --set name="$name" --set password="$password" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
done
