//go:build linux

package meshagent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/meshagent/services"
)

func portOf(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func listening(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (s *started) service(t *testing.T, name string) ServiceStatus {
	t.Helper()
	list := s.Services()
	if i := slices.IndexFunc(list, func(s ServiceStatus) bool { return s.Service == name }); i >= 0 {
		return list[i]
	}
	return ServiceStatus{}
}

// is waits for the state of a service on its host, and that the CA has heard the same.
func (s *started) is(t *testing.T, name, state string) ServiceStatus {
	t.Helper()
	var found ServiceStatus
	eventually(t, name+" "+state, func() error {
		if found = s.service(t, name); found.State != state {
			return fmt.Errorf("%+v", found)
		}
		heard := "nothing"
		for _, i := range s.State().View.Instances {
			if i.Service == name && i.Agent == "h1" {
				heard = map[bool]string{true: "healthy", false: "unhealthy"}[i.Healthy]
			}
		}
		if want := map[string]string{"healthy": "healthy", "unhealthy": "unhealthy"}[state]; heard != want && (want != "" || heard != "nothing") {
			return fmt.Errorf("the CA has heard: %s", heard)
		}
		return nil
	})
	return found
}

// A host says where and how healthy a service is that the catalogue places on it, and of no
// other: neither by its file, nor by the directory, nor by command, nor to the CA behind the
// agent's back.
func TestRegistrationsGiveNoIdentity(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	web, other := listening(t), listening(t)
	c.Apply(serviceYAML("web", self()+fmt.Sprintf("\nport: %d", portOf(other))) +
		serviceYAML("caller", self()) +
		serviceYAML("ledger", fmt.Sprintf("run: {uid: %d, hosts: [h2]}\nport: 9", os.Getuid())))
	drops := t.TempDir()
	os.Chmod(drops, 0o755)
	if err := os.WriteFile(filepath.Join(drops, "x.yaml"), fmt.Appendf(nil, "services: [{service: ledger, port: %d}, {service: nobody, port: %[1]d}]", portOf(web)), 0o644); err != nil {
		t.Fatal(err)
	}
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1", "127.0.0.1")+"}", "sidecar: {inbound: \"127.0.0.1:1\"}",
		"health: {interval: 100ms}", "servicesDir: "+drops, fmt.Sprintf("services: [{service: web, port: %d}, {service: caller, port: %[1]d}]", portOf(web))))
	eventually(t, "ready", agent.Ready)

	if s := agent.is(t, "web", "healthy"); s.Address != web.Addr().String() || s.Source != "agent.yaml:9" {
		t.Errorf("control: %+v", s)
	}
	for name, want := range map[string]string{"ledger": "no entry places service ledger on host h1", "nobody": "no entry places", "caller": "only calls others"} {
		if s := agent.service(t, name); s.State != "refused" || !strings.Contains(s.Why, want) || !strings.Contains(s.Why, "entente apply") {
			t.Errorf("%s: %+v", name, s)
		}
		err := agent.Register([]services.Registration{{Service: "web"}, {Service: name}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s by command: %v", name, err)
		}
		if err := agent.Drain(t.Context(), name, 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s drained: %v", name, err)
		}
	}
	if s := agent.service(t, "web"); s.Source != "agent.yaml:9" {
		t.Errorf("a part of what was refused was taken: %+v", s)
	}
	if len(agent.State().Identities) != 2 {
		t.Errorf("identities: %v", agent.State().Identities)
	}
	for _, i := range c.Status().GetInstances() {
		if i.GetService() != "web" {
			t.Errorf("reported: %v", i)
		}
	}

	// The entry comes: what was registered counts from then on. It goes: no longer.
	c.Apply(serviceYAML("ledger", self()+"\nport: 9"))
	if s := agent.is(t, "ledger", "healthy"); s.Address != web.Addr().String() {
		t.Errorf("%+v", s)
	}
	c.Apply(serviceYAML("ledger", "run: {uid: 1, hosts: [h2]}\nport: 9"))
	agent.is(t, "ledger", "refused")
}

// Who listens at a service's port and is not that service is not healthy.
func TestImpostorIsNotHealthy(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	l := listening(t)
	c.Apply(serviceYAML("mine", self()+fmt.Sprintf("\nport: %d", portOf(l))) +
		serviceYAML("other", fmt.Sprintf("run: {uid: %d, hosts: [h1]}\nport: %d", os.Getuid()+1, portOf(l))))
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1", "127.0.0.1")+"}", "sidecar: {inbound: \"127.0.0.1:1\"}", "health: {interval: 100ms}"))
	agent.is(t, "mine", "healthy")
	eventually(t, "said to be somebody else's", func() error {
		if s := agent.is(t, "other", "unhealthy"); !strings.Contains(s.Why, "is not spiffe://banking.example/other") {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// What is registered by command is reported, outlives the agent, and stays drained.
func TestRegisterByCommand(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	var sick atomic.Bool
	sick.Store(true)
	l := listening(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	t.Cleanup(server.Close)
	c.Apply(serviceYAML("web", self()+"\nport: 9"))
	dir := t.TempDir()
	start := func() *started {
		return startAgent(t, configure(t, "dataDir: "+dir, "ca: {token: "+c.AgentToken("h1", "dc1", "127.0.0.1")+"}", "sidecar: {inbound: \"127.0.0.1:1\"}", "health: {interval: 100ms}"))
	}
	agent := start()
	agent.is(t, "web", "unhealthy") // nobody listens
	if err := agent.Register([]services.Registration{{Service: "web", Port: uint16(portOf(l)), Health: &services.Health{HTTP: "/healthz"}}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "checked", func() error {
		if s := agent.service(t, "web"); !strings.Contains(s.Why, "503") {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	agent.stop()
	sick.Store(false)
	agent = start()
	if s := agent.is(t, "web", "healthy"); s.Source != services.FromCommand || s.Check != "http /healthz" {
		t.Errorf("after a restart: %+v", s)
	}
	if err := agent.Drain(t.Context(), "web", time.Minute); err != nil {
		t.Fatal(err)
	}
	agent.is(t, "web", "drained")
	agent.stop()
	agent = start()
	agent.is(t, "web", "drained")
	if err := agent.Restore("web"); err != nil {
		t.Fatal(err)
	}
	agent.is(t, "web", "healthy")
	if err := agent.Deregister("web"); err != nil {
		t.Fatal(err)
	}
	if s := agent.is(t, "web", "unhealthy"); s.Source != FromCatalogue {
		t.Errorf("%+v", s)
	}
}

// Requests that the sidecar could not hand over are reported within no time of the checks;
// checks bring the instance back.
func TestPassiveHealth(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	l := listening(t)
	c.Apply(serviceYAML("web", self()+fmt.Sprintf("\nport: %d", portOf(l))))
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1", "127.0.0.1")+"}", "sidecar: {inbound: \"127.0.0.1:1\"}",
		"health: {interval: 500ms, outlierDetection: {consecutiveLocalOriginFailure: 3}}"))
	agent.is(t, "web", "healthy")
	instance := agent.State().Services[0].Instance
	for range 2 {
		instance.Begin()
		instance.End(0, errors.New("connection reset"))
	}
	instance.Begin()
	instance.End(200, nil)
	if s := agent.service(t, "web"); s.State != "healthy" {
		t.Errorf("control: %+v", s)
	}
	for range 3 {
		instance.Begin()
		instance.End(0, errors.New("connection reset"))
	}
	if s := agent.is(t, "web", "unhealthy"); !strings.Contains(s.Why, "3 requests in a row went wrong, the last: connection reset") {
		t.Errorf("%+v", s)
	}
	agent.is(t, "web", "healthy")
}

// A drain waits for the requests under way, for as long as it may; hanging up ends one that
// is held, and one that is kept not.
func TestDrainLasts(t *testing.T) {
	c := catest.Start(t, catest.Options{})
	l := listening(t)
	c.Apply(serviceYAML("web", self()+fmt.Sprintf("\nport: %d", portOf(l))))
	agent := startAgent(t, configure(t, "dataDir: "+t.TempDir(), "ca: {token: "+c.AgentToken("h1", "dc1", "127.0.0.1")+"}", "sidecar: {inbound: \"127.0.0.1:1\"}",
		"health: {interval: 100ms}", "services: [{service: web, drain: 1h}]"))
	agent.is(t, "web", "healthy")
	instance := agent.State().Services[0].Instance
	instance.Begin()
	ctx, cancel := context.WithCancel(t.Context())
	held := make(chan error, 1)
	go func() { _, err := agent.HoldDrained(ctx, "web", 0); held <- err }()
	agent.is(t, "web", "draining")
	cancel()
	if err := <-held; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	agent.is(t, "web", "healthy")
	if instance.Open().Err() != nil {
		t.Error("its requests were cut")
	}

	kept := make(chan error, 1)
	go func() { kept <- agent.Drain(t.Context(), "web", 0) }()
	agent.is(t, "web", "draining")
	if err := agent.Restore("web"); err != nil {
		t.Error(err)
	}
	if err := <-kept; err == nil || !strings.Contains(err.Error(), "was restored") {
		t.Error(err)
	}
	if err := agent.Drain(t.Context(), "web", 10*time.Millisecond); err != nil { // the request takes longer
		t.Error(err)
	}
	if instance.Open().Err() == nil {
		t.Error("the request was not cut")
	}
	agent.is(t, "web", "drained")
	if err := agent.Restore("web"); err != nil {
		t.Fatal(err)
	}
	release, err := agent.HoldDrained(t.Context(), "web", time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	agent.is(t, "web", "drained")
	release()
	agent.is(t, "web", "healthy")
}
