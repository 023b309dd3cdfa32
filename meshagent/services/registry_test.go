package services

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/entente-mesh/entente/internal/yamlfile"
)

func TestRead(t *testing.T) {
	const example = "../../docs/packaging/services.d/web.yaml"
	if shown, err := os.Open(example); err != nil {
		t.Error(err)
	} else if list, err := Read(example, shown); err != nil || len(list) != 1 {
		t.Errorf("%v %v", list, err)
	}
	text := `services:
- service: web
  port: 8081
  address: 127.0.0.2
  drain: 30s
  health:
    http: /healthz?deep=1
    port: 8082
    interval: 2s
    timeout: 500ms
    healthyThreshold: 3
    unhealthyThreshold: 2
    initial: healthy
    outlierDetection: {consecutive5xx: 5, consecutiveLocalOriginFailure: 0, baseEjectionTime: 10s}
- {service: rpc, health: {grpc: {}}}
- {service: queue, health: {command: [/usr/bin/check, "a b"]}}
- {service: plain}
`
	list, err := Read("web.yaml", strings.NewReader(text))
	if err != nil || len(list) != 4 || list[1].Pos.String() != "web.yaml:15" {
		t.Fatalf("%+v %v", list, err)
	}
	catalogue := FromCatalogue("x.banking.example", "127.0.0.1:80", "/live", Defaults())
	for i, want := range []string{
		"http /healthz?deep=1 127.0.0.1:8082 2s 500ms 3 2 true {0 5 10s 5m0s}",
		"grpc 127.0.0.1:80 1s 1s 2 1 false {5 0 30s 5m0s}",
		"command /usr/bin/check a b 127.0.0.1:80 1s 1s 2 1 false {5 0 30s 5m0s}",
		"http /live 127.0.0.1:80 1s 1s 2 1 false {5 0 30s 5m0s}",
	} {
		c := catalogue.With(list[i].Health, Defaults())
		if got := fmt.Sprint(c, " ", c.Address, " ", c.Interval, c.Timeout, " ", c.HealthyThreshold, c.UnhealthyThreshold, c.InitiallyHealthy, c.Limits); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	for bad, want := range map[string]string{
		"":                          "web.yaml",
		"services: []":              "empty",
		"service: web":              "unknown key",
		"services: [{port: 80}]":    `"service" is missing`,
		"services:\n- service: WEB": "web.yaml:2",
		"services:\n- service: web\n- service: web":                                                "twice, first at line 2",
		"services:\n- service: web\n  port: 0":                                                     "too small",
		"services:\n- service: web\n  port: 70000":                                                 "web.yaml:3",
		"services:\n- service: web\n  address: 10.0.0.1":                                           "web.yaml:3:3: \"10.0.0.1\" is not a loopback address",
		"services:\n- service: web\n  address: localhost":                                          "not a loopback",
		"services:\n- service: web\n  spiffeID: spiffe://a/b":                                      "unknown key",
		"services:\n- service: web\n  drain: 2h":                                                   "1h",
		"services:\n- service: web\n  health: {http: /a, tcp: true}":                               "give one of them",
		"services:\n- service: web\n  health: {http: a}":                                           "not a path",
		"services:\n- service: web\n  health: {http: \"/a b\"}":                                    "not a path",
		"services:\n- service: web\n  health: {command: []}":                                       "absolute path",
		"services:\n- service: web\n  health: {command: [check]}":                                  "absolute path",
		"services:\n- service: web\n  health: {port: 80}":                                          "say which",
		"services:\n- service: web\n  health: {command: [/c], port: 80}":                           "say which",
		"services:\n- service: web\n  health: {tcp: true, interval: 1ms}":                          "100ms",
		"services:\n- service: web\n  health: {initial: good}":                                     "healthy, unhealthy",
		"services:\n- service: web\n  health: {unhealthyThreshold: 0}":                             "too small",
		"services:\n- service: web\n  health: {outlierDetection: {consecutive5xx: -1}}":            "too small",
		"services:\n- service: web\n---\nservices:\n- service: two":                                "second document",
		"services:\n" + strings.Repeat("- service: a\n", 2000):                                     "at most 1000",
		"services:\n- service: web\n  health: {http: /a, outlierDetection: {maxEjectionTime: 0s}}": "too small",
	} {
		if _, err := Read("web.yaml", strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "web.yaml") {
			t.Errorf("%.80q: %v, want %q", bad, err, want)
		}
	}
}

// FuzzRead: what is read is what was meant, within bounds, and can be written and read again.
func FuzzRead(f *testing.F) {
	f.Add("services:\n- service: web\n  port: 8081\n  health: {http: /healthz, interval: 2s}\n")
	f.Add("services: [{service: a, health: {grpc: {service: x}, outlierDetection: {consecutive5xx: 0}}}]")
	f.Add("services: [{service: a, health: {command: [/x, \"\\0\"]}}]")
	f.Add("services: [{service: a, address: ::1, drain: 1h}]")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := Read("f.yaml", strings.NewReader(text))
		if err != nil {
			return
		}
		if len(list) == 0 || len(list) > MaxServices {
			t.Fatalf("%d services", len(list))
		}
		strip := func(list []Registration) []Registration {
			for i := range list {
				list[i].Pos = yamlfile.Pos{}
				if h := list[i].Health; h != nil {
					h.Pos = yamlfile.Pos{}
					if c := FromCatalogue("x", "127.0.0.1:1", "", Defaults()).With(h, Defaults()); c.Interval < 100*time.Millisecond || c.Timeout < 10*time.Millisecond || c.HealthyThreshold < 1 || c.UnhealthyThreshold < 1 {
						t.Fatalf("%+v", c)
					}
				}
			}
			return list
		}
		again, err := Write(list)
		if err != nil {
			t.Fatal(err)
		}
		list2, err := Read("g.yaml", strings.NewReader(string(again)))
		if err != nil || !reflect.DeepEqual(strip(list), strip(list2)) {
			t.Fatalf("%v: %+v became %+v", err, list, list2)
		}
	})
}

// host is a registry with its directories.
type host struct {
	*Registry
	drops, data string
}

func open(t *testing.T, own string, from *host) *host {
	h := from
	if h == nil {
		h = &host{drops: t.TempDir(), data: t.TempDir()}
		if err := os.Chmod(h.drops, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var registrations []Registration
	if own != "" {
		var err error
		if registrations, err = Read("agent.yaml", strings.NewReader(own)); err != nil {
			t.Fatal(err)
		}
	}
	h.Registry = Open(registrations, h.drops, h.data, slog.New(slog.DiscardHandler), func() {})
	return h
}

func (h *host) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(h.drops, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (h *host) expect(t *testing.T, when string, want ...string) {
	t.Helper()
	var got []string
	s := h.Snapshot()
	for _, name := range s.Services() {
		line := name
		for _, r := range s.Of(name) {
			line += " " + strings.TrimPrefix(r.Source, h.drops+"/")
		}
		got = append(got, line)
	}
	for _, b := range s.Broken() {
		got = append(got, "broken: "+filepath.Base(b.File))
	}
	for _, name := range slices.Sorted(maps.Keys(s.drains)) {
		got = append(got, "drained: "+name)
	}
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("%s: %q, want %q", when, got, want)
	}
}

func services(names ...string) string {
	return "services:\n- service: " + strings.Join(names, "\n- service: ") + "\n"
}

// The directory is followed: a file that is broken leaves what it said before, and does no
// harm to others.
func TestDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := open(t, services("own", "web"), nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go h.Run(ctx)
		follow := func() { time.Sleep(4 * lookEvery); synctest.Wait() }
		synctest.Wait()
		h.expect(t, "at first", "own agent.yaml:2", "web agent.yaml:3")

		h.write(t, "a.yaml", services("web", "rpc"))
		h.write(t, "b.yaml", services("queue"))
		h.write(t, ".c.yaml", services("hidden"))
		h.write(t, "d.txt", services("other"))
		follow()
		h.expect(t, "files", "own agent.yaml:2", "queue b.yaml:2", "rpc a.yaml:3", "web a.yaml:2 agent.yaml:3")

		h.write(t, "a.yaml", services("web", "RPC"))
		h.write(t, "b.yaml", services("queue", "fresh"))
		follow()
		h.expect(t, "one is broken", "fresh b.yaml:3", "own agent.yaml:2", "queue b.yaml:2", "rpc a.yaml:3", "web a.yaml:2 agent.yaml:3", "broken: a.yaml")
		h.write(t, "a.yaml", services("web"))
		h.write(t, "b.yaml", services("fresh", "web"))
		follow()
		h.expect(t, "mended; another says what it says", "fresh b.yaml:3", "own agent.yaml:2", "queue b.yaml:2", "web a.yaml:2 agent.yaml:3", "broken: b.yaml")
		os.Remove(filepath.Join(h.drops, "a.yaml"))
		follow()
		h.expect(t, "removed", "fresh b.yaml:2", "own agent.yaml:2", "web b.yaml:3 agent.yaml:3")

		// Others may change it: no command in it is run.
		h.write(t, "w.yaml", services("evil"))
		os.Chmod(filepath.Join(h.drops, "w.yaml"), 0o666)
		if err := syscall.Mkfifo(filepath.Join(h.drops, "x.yaml"), 0o644); err != nil {
			t.Fatal(err)
		}
		os.Mkdir(filepath.Join(h.drops, "y.yaml"), 0o755)
		follow()
		h.expect(t, "files of no use", "fresh b.yaml:2", "own agent.yaml:2", "web b.yaml:3 agent.yaml:3", "broken: w.yaml", "broken: x.yaml", "broken: y.yaml")
		for _, name := range []string{"w.yaml", "x.yaml", "y.yaml"} {
			os.Remove(filepath.Join(h.drops, name))
		}
		follow()
		os.Chmod(h.drops, 0o777)
		h.write(t, "b.yaml", services("evil"))
		follow()
		h.expect(t, "the directory is open to others", "fresh b.yaml:2", "own agent.yaml:2", "web b.yaml:3 agent.yaml:3", "broken: "+filepath.Base(h.drops))
		os.Chmod(h.drops, 0o755)
		h.Reread()
		synctest.Wait()
		h.expect(t, "asked to read again", "evil b.yaml:2", "own agent.yaml:2", "web agent.yaml:3")
		os.RemoveAll(h.drops)
		follow()
		h.expect(t, "no directory", "own agent.yaml:2", "web agent.yaml:3")
	})
}

// A file that is being written is left in peace until it rests.
func TestDirectoryHalfWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := open(t, "", nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go h.Run(ctx)
		synctest.Wait()
		text := ""
		for i := range 20 {
			text += services(fmt.Sprint("s", i))[len("services:\n"):]
			h.write(t, "a.yaml", "services:\n"+text)
			time.Sleep(lookEvery)
			synctest.Wait()
			if n := len(h.Snapshot().Services()); n != 0 {
				t.Fatalf("%d services of a file that is still written", n)
			}
		}
		time.Sleep(3 * lookEvery)
		synctest.Wait()
		if n := len(h.Snapshot().Services()); n != 20 {
			t.Errorf("control: %d services", n)
		}
	})
}

// What was said by command counts before files and outlives the process.
func TestCommands(t *testing.T) {
	h := open(t, services("web"), nil)
	registration := func(text string) []Registration {
		list, err := Read("flags", strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	if err := h.Register(registration("services: [{service: web, port: 81}, {service: rpc, health: {outlierDetection: {consecutiveLocalOriginFailure: 0}}}]")); err != nil {
		t.Fatal(err)
	}
	if err := h.Register(registration("services: [{service: web, port: 82}]")); err != nil {
		t.Fatal(err)
	}
	if err := h.Drain("rpc", time.Minute); err != nil {
		t.Fatal(err)
	}
	release := h.Hold("web", 0)
	h.expect(t, "by command", "rpc command", "web command agent.yaml:2", "drained: rpc", "drained: web")
	if info, err := os.Stat(filepath.Join(h.data, "services.yaml")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	again := open(t, services("web"), &host{drops: h.drops, data: h.data})
	again.expect(t, "after a restart", "rpc command", "web command agent.yaml:2", "drained: rpc")
	if s := again.Snapshot(); s.Of("web")[0].Port != 82 || *s.Of("rpc")[0].Health.OutlierDetection.ConsecutiveLocalOriginFailure != 0 {
		t.Errorf("%+v", s.Of("web")[0])
	}
	release()
	release()
	if err := h.Restore("rpc"); err != nil {
		t.Fatal(err)
	}
	h.expect(t, "put back", "rpc command", "web command agent.yaml:2")
	for _, test := range []struct{ service, want string }{{"web", ""}, {"web", "agent.yaml:2, take it out there"}, {"nobody", "not registered"}} {
		if err := h.Deregister(test.service); (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.service, err)
		}
	}
	h.expect(t, "deregistered", "rpc command", "web agent.yaml:2")
	open(t, "", &host{drops: h.drops, data: h.data}).expect(t, "and forgotten", "rpc command")

	// A disk that takes nothing: nothing is changed.
	if err := os.Rename(h.data, h.data+".gone"); err != nil {
		t.Fatal(err)
	}
	if err := h.Register(registration(services("late"))); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("%v", err)
	}
	if err := h.Drain("rpc", 0); err == nil {
		t.Error("it is drained for as long as the process runs only")
	}
	h.expect(t, "nothing was kept", "rpc command", "web agent.yaml:2")

	damaged := &host{drops: h.drops, data: t.TempDir()}
	os.WriteFile(filepath.Join(damaged.data, "services.yaml"), []byte("services: [{service: web"), 0o600)
	open(t, services("web"), damaged).expect(t, "a damaged file", "web agent.yaml:2", "broken: services.yaml")
}
