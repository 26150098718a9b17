{{/* Airflow's services: one image, one environment, one shape. */}}

{{/* What all of Airflow's containers share. Takes root, values (of the component), admin (whether it is told the password). */}}
{{- define "nvr.airflow.container" -}}
{{- $airflow := .root.Values.airflow -}}
{{- $secret := include "nvr.airflow.secret" .root -}}
image: {{ include "nvr.image" (dict "root" .root "image" $airflow.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{ include "nvr.container.security" .root }}
envFrom:
  - configMapRef:
      name: {{ include "nvr.fullname" .root }}-airflow
  {{- with $airflow.extraEnvFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  {{- range $variable, $key := dict
      "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" "connection"
      "AIRFLOW__CORE__FERNET_KEY" "fernet-key"
      "AIRFLOW__API__SECRET_KEY" "api-secret-key"
      "AIRFLOW__API_AUTH__JWT_SECRET" "jwt-secret" }}
  - name: {{ $variable }}
    valueFrom:
      secretKeyRef:
        name: {{ $secret }}
        key: {{ $key }}
  {{- end }}
  {{- if .admin }}
  - name: AIRFLOW_ADMIN_PASSWORD
    valueFrom:
      secretKeyRef:
        name: {{ $secret }}
        key: admin-password
  {{- end }}
  {{- with $airflow.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  # airflow.cfg and the like, made anew at every start.
  - name: home
    mountPath: /opt/airflow
  {{- if $airflow.logs.persistence.enabled }}
  - name: logs
    mountPath: /opt/airflow/logs
  {{- end }}
  - name: tmp
    mountPath: /tmp
  - name: chart
    mountPath: /opt/nvr-chart
    readOnly: true
  {{- with $airflow.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A Deployment. Takes root, component, values, command (arguments of `airflow`), kubernetes (whether it talks to it),
prepare (script of the init container), login (whether that knows the admin's password), probes, ports. */}}
{{- define "nvr.airflow.deployment" -}}
{{- $airflow := .root.Values.airflow -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "nvr.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "nvr.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  replicas: {{ int .values.replicas }}
  {{- $oneNode := and $airflow.logs.persistence.enabled (not (has "ReadWriteMany" $airflow.logs.persistence.accessModes)) }}
  {{- if or $oneNode (eq .component "airflow-scheduler") }}
  # Not beside its successor: the scheduler's migrates the database, and a claim of one node cannot move while it is in use.
  strategy:
    type: Recreate
  {{- end }}
  selector:
    matchLabels:
      {{- include "nvr.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
  template:
    metadata:
      labels:
        {{- include "nvr.pod.labels" . | nindent 8 }}
      annotations:
        checksum/config: {{ include (print .root.Template.BasePath "/airflow/config.yaml") .root | sha256sum }}
        checksum/files: {{ include (print .root.Template.BasePath "/airflow/files.yaml") .root | sha256sum }}
        {{- with .values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "nvr.serviceAccount" (dict "root" .root "which" "airflow") }}
      automountServiceAccountToken: {{ .kubernetes }}
      terminationGracePeriodSeconds: {{ int .values.terminationGracePeriodSeconds }}
      {{- include "nvr.pod.common" .root | nindent 6 }}
      {{- include "nvr.pod.security" (dict "user" 10001 "group" 10001) | nindent 6 }}
      {{- with include "nvr.pod.placement" .values | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      initContainers:
        - name: prepare
          command: [sh, -euc]
          args:
            - |
              {{- .prepare | nindent 14 }}
          {{- include "nvr.airflow.container" (merge (dict "admin" .login) .) | nindent 10 }}
      containers:
        - name: {{ trimPrefix "airflow-" .component }}
          args: {{ toJson .command }}
          {{- with .ports }}
          ports:
            {{- range $name, $port := . }}
            - name: {{ $name }}
              containerPort: {{ $port }}
              protocol: TCP
            {{- end }}
          {{- end }}
          {{- .probes | nindent 10 }}
          {{- include "nvr.airflow.container" . | nindent 10 }}
      volumes:
        - name: home
          emptyDir: {}
        - name: tmp
          emptyDir: {}
        - name: chart
          configMap:
            name: {{ include "nvr.fullname" .root }}-airflow-files
        {{- if $airflow.logs.persistence.enabled }}
        - name: logs
          persistentVolumeClaim:
            claimName: {{ default (printf "%s-logs" (include "nvr.fullname" .root)) $airflow.logs.persistence.existingClaim }}
        {{- end }}
        {{- with $airflow.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end -}}

{{/* What a service's init container does: wait for a database of its own version. */}}
{{- define "nvr.airflow.wait" -}}
{{- $seconds := int .Values.airflow.database.waitTimeoutS -}}
python /opt/nvr-chart/wait_for_database.py {{ $seconds }}
airflow db check-migrations --migration-wait-timeout {{ $seconds }}
{{- end -}}

{{/* Probes of a service that opens no port, by the api-server's report on it: no second interpreter full of Airflow.
Restarted is who is reported unhealthy, not who cannot ask. Takes root, service. */}}
{{- define "nvr.airflow.reported" -}}
{{- $url := printf "http://%s:8080/api/v2/monitor/health" (include "nvr.host" (dict "root" .root "service" "airflow-api-server")) -}}
readinessProbe:
  exec:
    command:
      - python
      - -c
      - |
        import json, urllib.request
        report = json.load(urllib.request.urlopen("{{ $url }}", timeout=8))
        raise SystemExit(report["{{ .service }}"]["status"] != "healthy")
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 4
livenessProbe:
  exec:
    command:
      - python
      - -c
      - |
        import json, urllib.request
        try:
            report = json.load(urllib.request.urlopen("{{ $url }}", timeout=8))
        except (OSError, ValueError):
            raise SystemExit(0)
        database, service = report["metadatabase"], report["{{ .service }}"]
        raise SystemExit(database["status"] == "healthy" and service["status"] != "healthy")
  initialDelaySeconds: 120
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 5
{{- end -}}
