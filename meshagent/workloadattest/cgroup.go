package workloadattest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// parseCgroup takes the path in the unified hierarchy out of /proc/PID/cgroup,
// cgroups(7): the line that begins with "0::". The kernel allows no line break in a
// cgroup's name.
func parseCgroup(data []byte) (string, error) {
	for line := range bytes.Lines(data) {
		path, ok := strings.CutPrefix(strings.TrimSuffix(string(line), "\n"), "0::")
		if !ok {
			continue
		}
		if !strings.HasPrefix(path, "/") {
			return "", fmt.Errorf("/proc/PID/cgroup: %.100q is not a path", path)
		}
		if path == "/.." || strings.HasPrefix(path, "/../") {
			return "", errors.New("the process is outside of the agent's cgroup namespace")
		}
		return path, nil
	}
	return "", errors.New("this host has no cgroup v2")
}

// place is what a cgroup's path says of the processes in it.
type place struct {
	unit      string // of the system's service manager; empty: none
	container string // 64 hex digits; empty: none
	// delegate is the unit below which the container's cgroup lies, if whoever runs
	// that unit could have made it: its id is then only a claim.
	delegate string
}

// locate reads a cgroup's path as systemd and the container runtimes lay it out:
//
//	/system.slice/accounts.service                     a unit; below it may be its own cgroups
//	/system.slice/docker-ID.scope                      docker, podman (libpod-), containerd (nerdctl-, cri-containerd-), CRI-O (crio-)
//	/kubepods.slice/kubepods-POD.slice/cri-containerd-ID.scope
//	/docker/ID  /kubepods/burstable/podUID/ID          the cgroupfs driver
//	/system.slice/containerd.service/kubepods-POD.slice:cri-containerd:ID
//	/user.slice/user-1000.slice/user@1000.service/…    what user 1000 was given to arrange as he likes
//
// Only root makes cgroups, except below a unit that was delegated to a user. So the
// outermost unit counts, and the outermost container.
func locate(path string) place {
	var p place
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		id := containerID(part)
		if id != "" && p.container == "" {
			p.container = id
			if p.unit != "" && !runtimes[p.unit] {
				p.delegate = p.unit
			}
		}
		if p.unit == "" && (strings.HasSuffix(part, ".service") || strings.HasSuffix(part, ".scope")) {
			if p.container != "" && id == "" {
				continue // a unit inside of a container is the container's business
			}
			p.unit = part
		}
	}
	return p
}

// runtimes are units whose cgroups below are containers, made by root.
var runtimes = map[string]bool{
	"docker.service": true, "containerd.service": true, "crio.service": true, "kubelet.service": true, "k3s.service": true,
}

// containerID takes a container's id out of one part of a path. The monitors that
// some runtimes put beside a container (libpod-conmon-ID.scope) are not in it.
func containerID(part string) string {
	name := part
	if scope, ok := strings.CutSuffix(part, ".scope"); ok {
		for _, prefix := range []string{"docker-", "libpod-", "nerdctl-", "cri-containerd-", "crio-"} {
			if id, ok := strings.CutPrefix(scope, prefix); ok {
				return hexID(id)
			}
		}
		return ""
	}
	if fields := strings.Split(part, ":"); len(fields) == 3 { // SLICE:RUNTIME:ID
		name = fields[2]
	}
	if id, ok := strings.CutPrefix(name, "libpod-"); ok { // podman with the cgroupfs driver
		name = id
	}
	return hexID(name)
}

// hexID returns s if it is the id of a container.
func hexID(s string) string {
	if len(s) != 64 || strings.Trim(s, "0123456789abcdef") != "" {
		return ""
	}
	return s
}
