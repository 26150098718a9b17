{{/* Names, labels, images, and what else several manifests say in the same words. */}}

{{- define "nvr.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "nvr.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Namespace of stages' pods. */}}
{{- define "nvr.tasks.namespace" -}}
{{- default .Release.Namespace .Values.tasks.namespace -}}
{{- end -}}

{{- define "nvr.selector" -}}
app.kubernetes.io/name: {{ include "nvr.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nvr.labels" -}}
{{ include "nvr.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What network policies know stages' pods by; the runner gives them other labels of app.kubernetes.io. */}}
{{- define "nvr.tasks.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: nvr-stages
{{- end -}}

{{/* An image's reference. Takes root and image. */}}
{{- define "nvr.image" -}}
{{- $registry := default .root.Values.image.registry .image.registry | trimSuffix "/" -}}
{{- $name := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Name of a service account. Takes root and which (airflow, mlflow, tasks). */}}
{{- define "nvr.serviceAccount" -}}
{{- $account := index .root.Values.serviceAccounts .which -}}
{{- default (printf "%s-%s" (include "nvr.fullname" .root) (ternary "stages" .which (eq .which "tasks"))) $account.name -}}
{{- end -}}

{{/* Host name of one of our services, as its own namespace and stages' find it. Takes root and service. */}}
{{- define "nvr.host" -}}
{{- $name := printf "%s-%s" (include "nvr.fullname" .root) .service -}}
{{- if eq (include "nvr.tasks.namespace" .root) .root.Release.Namespace -}}
{{- $name -}}
{{- else -}}
{{- printf "%s.%s" $name .root.Release.Namespace -}}
{{- end -}}
{{- end -}}

{{- define "nvr.objectStore.endpoint" -}}
{{- if .Values.objectStore.endpoint -}}
{{- .Values.objectStore.endpoint -}}
{{- else if .Values.s3.enabled -}}
{{- printf "http://%s:8333" (include "nvr.host" (dict "root" . "service" "s3")) -}}
{{- end -}}
{{- end -}}

{{/* Address of an ingress. Takes its values. */}}
{{- define "nvr.ingress.url" -}}
{{- printf "%s://%s" (ternary "https" "http" (ne .tlsSecret "")) .host -}}
{{- end -}}

{{- define "nvr.airflow.url" -}}
{{- if .Values.airflow.baseUrl -}}
{{- .Values.airflow.baseUrl -}}
{{- else if .Values.airflow.ingress.enabled -}}
{{- include "nvr.ingress.url" .Values.airflow.ingress -}}
{{- else -}}
http://localhost:8080
{{- end -}}
{{- end -}}

{{- define "nvr.mlflow.url" -}}
{{- if .Values.tasks.mlflowUi -}}
{{- .Values.tasks.mlflowUi -}}
{{- else if .Values.mlflow.ingress.enabled -}}
{{- include "nvr.ingress.url" .Values.mlflow.ingress -}}
{{- else if .Values.mlflow.enabled -}}
http://localhost:5000
{{- else -}}
{{- .Values.tasks.mlflowTrackingUri -}}
{{- end -}}
{{- end -}}

{{- define "nvr.mlflow.trackingUri" -}}
{{- if .Values.mlflow.enabled -}}
{{- printf "http://%s:5000" (include "nvr.host" (dict "root" . "service" "mlflow")) -}}
{{- else -}}
{{- .Values.tasks.mlflowTrackingUri -}}
{{- end -}}
{{- end -}}

{{/* Names of Secrets: given ones, else those of secrets.yaml. */}}
{{- define "nvr.airflow.secret" -}}
{{- default (printf "%s-airflow" (include "nvr.fullname" .)) .Values.airflow.existingSecret -}}
{{- end -}}
{{- define "nvr.mlflow.secret" -}}
{{- default (printf "%s-mlflow" (include "nvr.fullname" .)) .Values.mlflow.existingSecret -}}
{{- end -}}
{{- define "nvr.postgresql.secret" -}}
{{- default (printf "%s-postgresql" (include "nvr.fullname" .)) .Values.postgresql.existingSecret -}}
{{- end -}}
{{- define "nvr.s3.secret" -}}
{{- default (printf "%s-s3" (include "nvr.fullname" .)) .Values.s3.existingSecret -}}
{{- end -}}

{{/* Secret with MLflow's keys of the store; empty where a role does without. */}}
{{- define "nvr.mlflow.objectStoreSecret" -}}
{{- if .Values.mlflow.objectStoreSecret -}}
{{- .Values.mlflow.objectStoreSecret -}}
{{- else if .Values.s3.enabled -}}
{{- include "nvr.s3.secret" . -}}
{{- end -}}
{{- end -}}

{{/* All that stages get as environment. */}}
{{- define "nvr.tasks.envFrom" -}}
{{- $from := list (printf "configmap/%s-tasks" (include "nvr.fullname" .)) -}}
{{- if .Values.s3.enabled -}}
{{- $from = append $from (printf "secret/%s" (include "nvr.s3.secret" .)) -}}
{{- end -}}
{{- with .Values.tasks.existingSecret -}}
{{- $from = append $from (printf "secret/%s" .) -}}
{{- end -}}
{{- join "," $from -}}
{{- end -}}

{{/* The recipe as stages find it. */}}
{{- define "nvr.recipe" -}}
{{- if hasKey .Values.recipes .Values.dags.recipe -}}
{{- printf "/opt/nvr-recipes/%s.yaml" .Values.dags.recipe -}}
{{- else -}}
{{- .Values.dags.recipe -}}
{{- end -}}
{{- end -}}
