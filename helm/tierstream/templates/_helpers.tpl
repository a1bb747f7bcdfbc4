{{- define "tierstream.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "tierstream.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "tierstream.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "tierstream.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tierstream.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tierstream.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: stream
{{- end -}}

{{- define "tierstream.labels" -}}
{{ include "tierstream.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{- end -}}

{{- define "tierstream.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tierstream.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "tierstream.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* The settings as the service reads them: the user's, storage on the volume, and where the admin port listens. */ -}}
{{- define "tierstream.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $storage := default dict $config.storage -}}
{{- $file := dict "type" "sqlite" "path" "/var/lib/tierstream/objects.sqlite" -}}
{{- $folder := dict "type" "filesystem" "path" "/var/lib/tierstream/objects" -}}
{{- range $part, $local := dict "high_volume" $file "long_term" $folder "change_log" $file -}}
{{- $chosen := default dict (get $storage $part) -}}
{{- if eq (default $local.type $chosen.type) $local.type -}}
{{- $_ := set $storage $part (mustMergeOverwrite (deepCopy $local) $chosen) -}}
{{- end -}}
{{- end -}}
{{- $admin := mustMergeOverwrite (default dict $config.admin) (dict "host" "0.0.0.0" "port" (int .Values.adminPort)) -}}
{{- toYaml (mustMergeOverwrite $config (dict "admin" $admin "storage" $storage)) -}}
{{- end -}}

{{- /* A duration such as 25s, 1m30s or 250ms, in whole seconds, rounded up. */ -}}
{{- define "tierstream.seconds" -}}
{{- $total := 0.0 -}}
{{- range regexFindAll "[0-9.]+(ms|s|m|h|d)" (toString .) -1 -}}
{{- $unit := regexReplaceAll "^[0-9.]+" . "" -}}
{{- $number := float64 (regexReplaceAll "[a-z]+$" . "") -}}
{{- $total = addf $total (mulf $number (get (dict "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0) $unit)) -}}
{{- end -}}
{{- $total | ceil | int -}}
{{- end -}}

{{- /* What a stop may take (drain + 15 s), 15 s to spare, and the wait before it. */ -}}
{{- define "tierstream.gracePeriod" -}}
{{- $rebalance := default dict .Values.config.rebalance -}}
{{- $drain := include "tierstream.seconds" (default "25s" $rebalance.drain_timeout) | int -}}
{{- add $drain 15 15 (int .Values.preStopSeconds) -}}
{{- end -}}

{{- define "tierstream.highVolume" -}}
{{- dig "storage" "high_volume" "type" "sqlite" .Values.config -}}
{{- end -}}
{{- define "tierstream.longTerm" -}}
{{- dig "storage" "long_term" "type" "filesystem" .Values.config -}}
{{- end -}}
{{- define "tierstream.changeLog" -}}
{{- dig "storage" "change_log" "type" "sqlite" .Values.config -}}
{{- end -}}

{{- /* "true" where a tier or the change log lives on one host. */ -}}
{{- define "tierstream.local" -}}
{{- if or (ne (include "tierstream.highVolume" .) "bigtable") (ne (include "tierstream.longTerm" .) "gcs") (ne (include "tierstream.changeLog" .) "bigtable") -}}
true
{{- end -}}
{{- end -}}

{{- define "tierstream.volumeNeeded" -}}
{{- if and .Values.persistence.enabled (include "tierstream.local" .) -}}
true
{{- end -}}
{{- end -}}

{{- /* Values that are each fine and together are not. */ -}}
{{- define "tierstream.check" -}}
{{- if include "tierstream.local" . -}}
{{- if gt (int .Values.replicaCount) 1 -}}
{{- fail "replicaCount > 1 needs storage that serves any number of processes: config.storage with bigtable (high_volume, change_log) and gcs (long_term)" -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.type "none") (gt (int .Values.autoscaling.maxReplicas) 1) -}}
{{- fail "autoscaling needs storage that serves any number of processes: config.storage with bigtable (high_volume, change_log) and gcs (long_term)" -}}
{{- end -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.type "none") (gt (int .Values.autoscaling.minReplicas) (int (include "tierstream.maxReplicas" .))) -}}
{{- fail "autoscaling.minReplicas is more than autoscaling.maxReplicas or autoscaling.partitions allow" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.service.enabled) -}}
{{- fail "serviceMonitor.enabled needs service.enabled; or use podMonitor" -}}
{{- end -}}
{{- end -}}

{{- define "tierstream.maxReplicas" -}}
{{- min (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.partitions) -}}
{{- end -}}
