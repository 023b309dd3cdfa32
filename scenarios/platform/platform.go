// Package platform holds the service programs of the financial platform: plain
// HTTP programs that know nothing of the mesh but one loopback address, at which
// they call others by name, and one header, in which they are told who calls them.
//
// One process runs one or more services. Beside them it has a control socket for
// the runner: what the process sees of its own identities, and what it shall do in
// the story.
package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// Config is the file of one process.
type Config struct {
	Datacenter  string    `yaml:"datacenter,required"`
	Control     string    `yaml:"control,required"`     // unix socket of the runner's verbs
	WorkloadAPI string    `yaml:"workloadAPI,required"` // unix socket of the host's agent
	Services    []Service `yaml:"services,required"`
}

// Service is one service that the process serves.
type Service struct {
	Name     string            `yaml:"name,required"` // accounts.banking.example
	Program  string            `yaml:"program,oneof=accounts|ledger|portfolio|market-data|orders"`
	Listen   string            `yaml:"listen,required"`
	Outbound string            `yaml:"outbound"` // where it calls others; empty: it calls nobody
	Answers  map[string]string `yaml:"answers"`  // path -> JSON
}

// Answer is what every service answers with.
type Answer struct {
	Service    string          `json:"service"`
	Datacenter string          `json:"datacenter"`
	PID        int             `json:"pid"`
	Caller     string          `json:"caller"` // as X-Forwarded-Client-Cert says
	Data       json.RawMessage `json:"data,omitempty"`
	Sources    []Answer        `json:"sources,omitempty"` // answers of others that this one is made of
	Error      string          `json:"error,omitempty"`
}

// ServedBy lists the datacenters that an answer and its sources came from, sorted.
func (a Answer) ServedBy() []string {
	list := []string{a.Datacenter}
	for _, source := range a.Sources {
		list = append(list, source.ServedBy()...)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// Run runs the services of a configuration file until ctx ends.
func Run(ctx context.Context, configFile string) error {
	file, err := os.Open(configFile)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	defer file.Close()
	var config Config
	if err := yamlfile.Decode(configFile, file, &config); err != nil {
		return err
	}
	return run(ctx, config, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

func run(ctx context.Context, config Config, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group := daemon.NewGroup(ctx)
	identities := watchIdentities(group, config.WorkloadAPI, log)
	services := map[string]*service{}
	for _, c := range config.Services {
		if services[c.Name] != nil {
			return fmt.Errorf("service %s is configured twice", c.Name)
		}
		services[c.Name] = newService(c, config.Datacenter)
	}
	// All listeners before the first request is served: an address in use ends the
	// process while nobody depends on it.
	var tasks []func()
	closeAll := func() {}
	for _, s := range services {
		listener, err := daemon.Listen(s.Listen)
		if err != nil {
			closeAll()
			return fmt.Errorf("service %s: %w", s.Name, err)
		}
		before := closeAll
		closeAll = func() { listener.Close(); before() }
		tasks = append(tasks, func() {
			group.Go(s.Name, func(ctx context.Context) error { return serve(ctx, listener, s.handler()) })
		})
	}
	control, err := daemon.ListenUnix(config.Control, 0o600)
	if err != nil {
		closeAll()
		return fmt.Errorf("control socket: %w", err)
	}
	for _, task := range tasks {
		task()
	}
	group.Go("control", func(ctx context.Context) error {
		return serve(ctx, control, controlHandler(services, identities))
	})
	log.Info("serving", "services", len(services), "datacenter", config.Datacenter)
	return group.Wait()
}

func serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// service is one running service.
type service struct {
	Service
	datacenter string
	others     *http.Client // by way of its outbound listener; nil: it calls nobody
}

func newService(c Service, datacenter string) *service {
	s := &service{Service: c, datacenter: datacenter}
	if c.Outbound != "" {
		dialer := net.Dialer{Timeout: time.Second}
		s.others = &http.Client{
			Transport: &http.Transport{
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return dialer.DialContext(ctx, "tcp", c.Outbound)
				},
				MaxIdleConnsPerHost: 64,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
	}
	return s
}

func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	for path, body := range s.Answers {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			s.write(w, http.StatusOK, s.answer(r, json.RawMessage(body)))
		})
	}
	if program := programs[s.Program]; program != nil {
		program(s, mux)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a := s.answer(r, nil)
		a.Error = "nothing is served at " + r.Method + " " + r.URL.Path
		s.write(w, http.StatusNotFound, a)
	})
	return mux
}

func (s *service) answer(r *http.Request, data json.RawMessage) Answer {
	return Answer{Service: s.Name, Datacenter: s.datacenter, PID: os.Getpid(), Caller: forwardedCaller(r.Header), Data: data}
}

func (s *service) write(w http.ResponseWriter, status int, a Answer) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(a)
}

// forwardedCaller is the URI of the only element of X-Forwarded-Client-Cert.
// Anything but one element with one URI is no caller at all.
func forwardedCaller(h http.Header) string {
	values := h.Values("X-Forwarded-Client-Cert")
	if len(values) != 1 || strings.Contains(values[0], ",") {
		return ""
	}
	caller := ""
	for pair := range strings.SplitSeq(values[0], ";") {
		if uri, ok := strings.CutPrefix(pair, "URI="); ok {
			if caller != "" {
				return ""
			}
			caller = strings.Trim(uri, `"`)
		}
	}
	return caller
}

// ask calls another service on behalf of a request, and passes on what ties the
// two together.
func (s *service) ask(ctx context.Context, cause *http.Request, url string) (Answer, error) {
	if s.others == nil {
		return Answer{}, fmt.Errorf("%s calls nobody", s.Name)
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Answer{}, err
	}
	for _, name := range []string{"X-Request-Id", "Traceparent"} {
		if value := cause.Header.Get(name); value != "" {
			request.Header.Set(name, value)
		}
	}
	response, err := s.others.Do(request)
	if err != nil {
		return Answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return Answer{}, fmt.Errorf("read the answer of %s: %w", request.URL.Host, err)
	}
	if response.StatusCode != http.StatusOK {
		return Answer{}, fmt.Errorf("%s answered %s %s", request.URL.Host, response.Status, response.Header.Get("Entente-Refused"))
	}
	var a Answer
	if err := json.Unmarshal(body, &a); err != nil {
		return Answer{}, fmt.Errorf("the answer of %s is no JSON: %w", request.URL.Host, err)
	}
	return a, nil
}

const maxAnswer = 1 << 20
