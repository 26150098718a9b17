{{/* What the schema cannot say: values that go together. */}}
{{- define "nvr.checks" -}}
{{- $v := .Values -}}
{{- if not $v.postgresql.enabled -}}
  {{- if not $v.airflow.existingSecret -}}
    {{- fail "postgresql.enabled is false, so airflow.existingSecret must name the Secret with Airflow's database (key `connection`) and its other keys" -}}
  {{- end -}}
  {{- if and $v.mlflow.enabled (not $v.mlflow.existingSecret) -}}
    {{- fail "postgresql.enabled is false, so mlflow.existingSecret must name the Secret with MLflow's database (key `backend-store-uri`)" -}}
  {{- end -}}
{{- else -}}
  {{- $given := compact (list $v.postgresql.existingSecret $v.airflow.existingSecret (ternary $v.mlflow.existingSecret "" $v.mlflow.enabled)) -}}
  {{- if not (has (len $given) (list 0 (ternary 3 2 $v.mlflow.enabled))) -}}
    {{- fail "postgresql.existingSecret, airflow.existingSecret and mlflow.existingSecret hold the same passwords: give all of them, or none to have them generated" -}}
  {{- end -}}
{{- end -}}
{{- if and (not $v.mlflow.enabled) (not $v.tasks.mlflowTrackingUri) -}}
  {{- fail "mlflow.enabled is false, so tasks.mlflowTrackingUri must name the MLflow server" -}}
{{- end -}}
{{- if and $v.s3.enabled $v.objectStore.endpoint -}}
  {{- fail "objectStore.endpoint names another store than the bundled one: set s3.enabled to false, or leave it out" -}}
{{- end -}}
{{- if and $v.networkPolicy.egress.enabled (not $v.networkPolicy.enabled) -}}
  {{- fail "networkPolicy.egress.enabled is true, but networkPolicy.enabled is not: there would be no policy at all" -}}
{{- end -}}
{{- range $name, $value := $v.tasks.env -}}
  {{- if and $value (or (regexMatch "(?i)(SECRET[^/]*|PASSWORD|TOKEN|API_KEY)$" $name) (regexMatch "://[^/@]*:[^/@]+@" (toString $value))) -}}
    {{- fail (printf "tasks.env.%s would be there for everyone to read: put it into the Secret that tasks.existingSecret names" $name) -}}
  {{- end -}}
{{- end -}}
{{- range $name, $value := $v.airflow.config -}}
  {{- if regexMatch "://[^/@]*:[^/@]+@" (toString $value) -}}
    {{- fail (printf "airflow.config.%s would be there for everyone to read, with its password" $name) -}}
  {{- end -}}
{{- end -}}
{{- range $name := list "AIRFLOW__CORE__FERNET_KEY" "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" "AIRFLOW__API__SECRET_KEY" "AIRFLOW__API_AUTH__JWT_SECRET" -}}
  {{- if hasKey $v.airflow.config $name -}}
    {{- fail (printf "airflow.config.%s would be there for everyone to read: it comes from the Secret that airflow.existingSecret names" $name) -}}
  {{- end -}}
{{- end -}}
{{- range $stage, $wanted := $v.tasks.resources -}}
  {{- if and $wanted.gpu (not $v.tasks.gpu.enabled) -}}
    {{- fail (printf "tasks.resources.%s.gpu asks for a GPU, but tasks.gpu.enabled is false: stages would run without one" $stage) -}}
  {{- end -}}
{{- end -}}
{{- range $which, $ingress := dict "airflow" $v.airflow.ingress "mlflow" $v.mlflow.ingress -}}
  {{- if and $ingress.enabled (not $ingress.host) -}}
    {{- fail (printf "%s.ingress.enabled is true, so %s.ingress.host must name the host" $which $which) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
