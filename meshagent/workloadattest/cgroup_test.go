package workloadattest

import (
	"strings"
	"testing"
)

const (
	idA = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	idB = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"
)

func TestParseCgroup(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/web.service\n":                         "/system.slice/web.service",
		"12:cpu:/a\n1:name=systemd:/x.service\n0::/user.slice\n": "/user.slice", // hybrid: the unified line counts
		"0::/":         "/",
		"0::/a:b::c\n": "/a:b::c",
	} {
		if got, err := parseCgroup([]byte(text)); err != nil || got != want {
			t.Errorf("%q: %q %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "1:name=systemd:/system.slice/web.service\n", "0::\n", "0::x\n", "0::/../web.service\n", "0::/..\n", "10::/x\n"} {
		if got, err := parseCgroup([]byte(bad)); err == nil {
			t.Errorf("%q was read as %q", bad, got)
		}
	}
}

func TestLocate(t *testing.T) {
	for path, want := range map[string]place{
		"/":                         {},
		"/system.slice":             {},
		"/system.slice/web.service": {unit: "web.service"},
		"/system.slice/system-web.slice/web@1.service":      {unit: "web@1.service"},
		"/system.slice/web.service/other.service":           {unit: "web.service"}, // below it is web's own
		"/user.slice/user-1000.slice/session-3.scope":       {unit: "session-3.scope"},
		"/system.slice/web.service (deleted)":               {},
		"/system.slice/docker-" + idA + ".scope":            {unit: "docker-" + idA + ".scope", container: idA},
		"/system.slice/docker-" + idA + ".scope/init.scope": {unit: "docker-" + idA + ".scope", container: idA},
		"/docker/" + idA: {container: idA},
		"/docker/" + idA + "/system.slice/web.service":      {container: idA}, // a unit of the container's own systemd
		"/docker/" + idA + "/docker/" + idB:                 {container: idA}, // the outermost one
		"/machine.slice/libpod-" + idA + ".scope/container": {unit: "libpod-" + idA + ".scope", container: idA},
		"/libpod_parent/libpod-" + idA:                      {container: idA},
		"/machine.slice/libpod-conmon-" + idA + ".scope":    {unit: "libpod-conmon-" + idA + ".scope"}, // the monitor is not in it
		"/system.slice/nerdctl-" + idA + ".scope":           {unit: "nerdctl-" + idA + ".scope", container: idA},
		"/default/" + idA:                                   {container: idA},
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0.slice/cri-containerd-" + idA + ".scope": {unit: "cri-containerd-" + idA + ".scope", container: idA},
		"/kubepods.slice/kubepods-pod0.slice/crio-" + idA + ".scope":                                              {unit: "crio-" + idA + ".scope", container: idA},
		"/kubepods/burstable/pod01234567-89ab-cdef-0123-456789abcdef/" + idA:                                      {container: idA},
		"/system.slice/containerd.service/kubepods-besteffort-pod0.slice:cri-containerd:" + idA:                   {unit: "containerd.service", container: idA},
		// What a user can make below a unit that is his own.
		"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + idA + ".scope/container": {unit: "user@1000.service", container: idA, delegate: "user@1000.service"},
		"/user.slice/user-1000.slice/user@1000.service/app.slice/web.service":                         {unit: "user@1000.service"},
		"/system.slice/ci.service/docker/" + idA:                                                      {unit: "ci.service", container: idA, delegate: "ci.service"},
		"/docker/" + idA[1:]:                                                                          {},
		"/docker/" + strings.ToUpper(idA):                                                             {},
		"/docker/x" + idA:                                                                             {},
		"/system.slice/docker-" + idA[1:] + ".scope":                                                  {unit: "docker-" + idA[1:] + ".scope"},
		"/system.slice/evil-" + idA + ".scope":                                                        {unit: "evil-" + idA + ".scope"},
	} {
		if got := locate(path); got != want {
			t.Errorf("%s: got %+v, want %+v", path, got, want)
		}
	}
}

func FuzzLocate(f *testing.F) {
	f.Add("0::/system.slice/docker-" + idA + ".scope\n")
	f.Add("1:cpu:/x\n0::/user.slice/user@1.service/libpod-" + idB + ".scope/container\n")
	f.Add("0::/system.slice/containerd.service/a:b:" + idA)
	f.Fuzz(func(t *testing.T, text string) {
		path, err := parseCgroup([]byte(text))
		if err != nil {
			return
		}
		got := locate(path)
		if got.container != "" && (hexID(got.container) == "" || !strings.Contains(path, got.container)) {
			t.Errorf("container %q of %q", got.container, path)
		}
		if got.unit != "" && !strings.Contains(path, got.unit) || strings.Contains(got.unit, "/") {
			t.Errorf("unit %q of %q", got.unit, path)
		}
		// Nobody gets another unit or an undelegated container by making cgroups below his own.
		if got.unit != "" && strings.HasSuffix(path, "/"+got.unit) {
			below := locate(path + "/docker/" + idB)
			if below.unit != got.unit {
				t.Errorf("below %s it is %s", got.unit, below.unit)
			}
			if got.container == "" && !runtimes[got.unit] && below.delegate == "" {
				t.Errorf("below %s a container counts", got.unit)
			}
		}
	})
}
