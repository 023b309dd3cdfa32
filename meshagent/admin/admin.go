// Package admin is the agent's door for the administrator of its host: a unix socket
// of mode 0600, so that only the agent's own user and root get in. It speaks HTTP
// and JSON; its client is in the same package. It also serves DataPlane, as gateways do.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/dataplaneapi"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/services"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

const maxBody = 64 << 10 // bytes of a request

// Status is how the agent is.
type Status struct {
	TrustDomain string     `json:"trust_domain"`
	Agent       string     `json:"agent"`
	Datacenter  string     `json:"datacenter"`
	Ready       bool       `json:"ready"`
	Why         string     `json:"why,omitempty"` // it is not
	Revision    uint64     `json:"revision"`
	WorkloadAPI string     `json:"workload_api"`          // path of the socket
	AppAddress  string     `json:"app_address"`           // where applications listen, and where they call from
	PortOffset  int        `json:"port_offset,omitempty"` // added to the ports that the catalogue says
	Inbound     string     `json:"inbound,omitempty"`
	Identities  []Identity `json:"identities"`
	// AttestationGap is what the kernel leaves uncertain about workloads.
	AttestationGap string `json:"attestation_gap,omitempty"`
	// Skipped is what the CA sent and this release does not know, TooOld what of it restricts
	// and is not enforced on this host.
	Skipped []string `json:"skipped,omitempty"`
	TooOld  []string `json:"too_old,omitempty"`
	// CA is what comparing the CA nodes came to.
	CA CAStatus `json:"ca"`
	// Broken are files of registrations whose newest content is not used.
	Broken []services.Broken `json:"broken,omitempty"`
}

// CAStatus is which CA node the agent follows, and which it avoids.
type CAStatus struct {
	Node     string    `json:"node,omitempty"`
	Compared []string  `json:"compared,omitempty"` // others whose statements are fresh
	Doubt    string    `json:"doubt,omitempty"`    // what the only other node in reach holds against it
	DoubtBy  string    `json:"doubt_by,omitempty"`
	Avoided  []Avoided `json:"avoided,omitempty"`
}

// Avoided is a CA node that two others contradicted.
type Avoided struct {
	Node  string    `json:"node"`
	Why   string    `json:"why"`
	By    []string  `json:"by"`
	Until time.Time `json:"until"`
}

func caStatus(is client.Comparison) CAStatus {
	s := CAStatus{Node: is.Node, Compared: is.Heard, Doubt: is.Doubt, DoubtBy: is.DoubtBy}
	for _, a := range is.Avoided {
		s.Avoided = append(s.Avoided, Avoided{a.Name, a.Why, a.By, a.Until})
	}
	return s
}

// Services are those that run on the host or are registered there.
type Services struct {
	Services []meshagent.ServiceStatus `json:"services"`
	Broken   []services.Broken         `json:"broken,omitempty"`
}

// Identity is one entry of the host.
type Identity struct {
	Entry      string     `json:"entry"`
	SPIFFEID   string     `json:"spiffe_id"`
	ValidUntil *time.Time `json:"valid_until,omitempty"` // of its SVID; absent: it has none yet
	Healthy    *bool      `json:"healthy,omitempty"`     // of a service that listens
}

// Explanation is a process as the agent sees it.
type Explanation struct {
	PID        int           `json:"pid"`
	Selectors  []Selector    `json:"selectors"`
	Identities []Entitlement `json:"identities"` // of the host, by entry id
}

// Selector is one statement about a process, or why it cannot be made.
type Selector struct {
	Kind     string `json:"kind"`
	Selector string `json:"selector,omitempty"` // as an entry would name it
	Why      string `json:"why,omitempty"`      // it cannot be seen
}

// Entitlement says whether a process may have an identity.
type Entitlement struct {
	Entry    string `json:"entry"`
	SPIFFEID string `json:"spiffe_id"`
	Entitled bool   `json:"entitled"`
	Why      string `json:"why,omitempty"` // it is not
}

// Server is the door.
type Server struct {
	agent    *meshagent.Agent
	listener net.Listener
	log      *slog.Logger
	started  time.Time
	api      *dataplaneapi.Server
	remote   *dataplaneapi.Remote
	sidecar  atomic.Pointer[Sidecar] // nil: this host has none
}

// Listen opens the socket with mode 0600.
func Listen(path string) (net.Listener, error) {
	l, err := daemon.ListenUnix(path, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the agent's admin socket (admin.socket): %w", err)
	}
	return l, nil
}

// New returns a server for a listener whose connections are *net.UnixConn; log may be nil.
func New(agent *meshagent.Agent, listener net.Listener, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{agent: agent, listener: listener, log: log, started: time.Now()}
	s.api = dataplaneapi.New(s, log, nil)
	s.remote = dataplaneapi.NewRemote(s.api, s)
	return s
}

// Remote serves DataPlane to administrators with a role, who come to the sidecar's mTLS door.
func (s *Server) Remote() *dataplaneapi.Remote { return s.remote }

type connKey struct{}

// Run serves until ctx ends; it closes the listener and every connection.
func (s *Server) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.status()) })
	mux.HandleFunc("GET /v1/pid/{pid}", s.explain)
	mux.HandleFunc("POST /v1/runs/{id}", s.register)
	mux.HandleFunc("GET /v1/services", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.services()) })
	mux.HandleFunc("POST /v1/services", s.registerServices)
	mux.HandleFunc("DELETE /v1/services/{name}", s.change((*meshagent.Agent).Deregister))
	mux.HandleFunc("POST /v1/services/{name}/drain", s.drain)
	mux.HandleFunc("POST /v1/services/{name}/restore", s.change((*meshagent.Agent).Restore))
	connection := func(ctx context.Context) net.Conn { conn, _ := ctx.Value(connKey{}).(net.Conn); return conn }
	mux.Handle("POST /"+ententev1.DataPlane_ServiceDesc.ServiceName+"/", s.api.LocalHandler(connection))
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // of DataPlane
	server := &http.Server{
		Handler:           mux,
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 16},
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          stdlog.New(io.Discard, "", 0),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(s.listener)
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return ctx.Err()
	}
	return fmt.Errorf("the admin socket has ended: %w", err)
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value)
}

// refuse says what went wrong as text.
func refuse(w http.ResponseWriter, code int, err error) {
	http.Error(w, err.Error(), code)
}

func (s *Server) status() *Status {
	cfg, state := s.agent.Config(), s.agent.State()
	st := &Status{
		TrustDomain: cfg.TrustDomain, Agent: cfg.Name, Datacenter: cfg.Datacenter, Ready: true, Revision: state.View.Revision,
		CA:      caStatus(s.agent.Comparison()),
		Skipped: state.View.Skipped, TooOld: state.View.TooOld,
		WorkloadAPI: cfg.WorkloadAPI.Socket, AppAddress: cfg.Sidecar.AppAddress, PortOffset: cfg.Sidecar.PortOffset, Inbound: cfg.Sidecar.Inbound, Identities: []Identity{}, AttestationGap: s.agent.AttestationGap(), Broken: s.agent.Broken(),
	}
	if err := s.agent.Ready(); err != nil {
		st.Ready, st.Why = false, err.Error()
	}
	for _, identity := range state.Identities {
		is := Identity{Entry: identity.Entry.GetId(), SPIFFEID: identity.ID.String()}
		if identity.SVID != nil {
			is.ValidUntil = &identity.SVID.NotAfter
		}
		if service, ok := strings.CutPrefix(is.Entry, "service/"); ok {
			for _, instance := range state.View.Instances {
				if instance.Service == service && instance.Agent == cfg.Name {
					is.Healthy = &instance.Healthy
				}
			}
		}
		st.Identities = append(st.Identities, is)
	}
	return st
}

// explain shows the selectors of a process exactly as the agent sees them.
func (s *Server) explain(w http.ResponseWriter, r *http.Request) {
	pid, err := strconv.ParseInt(r.PathValue("pid"), 10, 32)
	if err != nil || pid <= 0 {
		refuse(w, http.StatusBadRequest, fmt.Errorf("%.20q is not the number of a process", r.PathValue("pid")))
		return
	}
	process, err := s.agent.AttestPID(int(pid))
	if err != nil {
		refuse(w, http.StatusNotFound, err)
		return
	}
	defer process.Close()
	answer(w, s.explanation(int(pid), process))
}

func (s *Server) explanation(pid int, process *workloadattest.Process) *Explanation {
	e := &Explanation{PID: pid, Selectors: []Selector{}, Identities: []Entitlement{}}
	for _, seen := range process.Selectors() {
		selector := Selector{Kind: seen.Kind}
		if seen.Err != nil {
			selector.Why = seen.Err.Error()
		} else {
			selector.Selector = seen.Kind + ":" + seen.Value
		}
		e.Selectors = append(e.Selectors, selector)
	}
	for _, identity := range s.agent.State().Identities {
		is := Entitlement{Entry: identity.Entry.GetId(), SPIFFEID: identity.ID.String(), Entitled: true}
		if err := process.Satisfies(identity.Demands); err != nil {
			is.Entitled, is.Why = false, err.Error()
		}
		e.Identities = append(e.Identities, is)
	}
	slices.SortStableFunc(e.Identities, func(x, y Entitlement) int {
		switch {
		case x.Entitled == y.Entitled:
			return 0
		case x.Entitled:
			return -1
		default:
			return 1
		}
	})
	return e
}

// register makes the process that called satisfy run:id:ID with all that it starts,
// until it hangs up. Nobody can register another process than himself.
func (s *Server) register(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, io.LimitReader(r.Body, maxBody)) // read to its end, or a hang-up is not noticed
	conn, ok := r.Context().Value(connKey{}).(*net.UnixConn)
	if !ok {
		refuse(w, http.StatusInternalServerError, errors.New("the caller did not come by the socket"))
		return
	}
	process, err := s.agent.AttestUnix(conn)
	if err != nil {
		refuse(w, http.StatusForbidden, err)
		return
	}
	defer process.Close()
	release, err := s.agent.RegisterRun(r.PathValue("id"), process)
	if err != nil {
		refuse(w, http.StatusConflict, err)
		return
	}
	defer release()
	s.log.Info("a run is registered", "pid", process.PID(), "uid", process.UID, "run", r.PathValue("id"))
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return
	}
	<-r.Context().Done()
	s.log.Info("a run has ended", "pid", process.PID(), "run", r.PathValue("id"))
}

func (s *Server) services() *Services {
	return &Services{s.agent.Services(), s.agent.Broken()}
}

// registerServices takes what a drop-in file may hold.
func (s *Server) registerServices(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("file")
	registrations, err := services.Read(name, http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil {
		err = s.agent.Register(registrations)
	}
	if err != nil {
		refuse(w, http.StatusUnprocessableEntity, err)
		return
	}
	for _, registration := range registrations {
		s.log.Info("service registered by command", "service", registration.Service)
	}
	answer(w, s.services())
}

// change makes a change that needs only the name of a service.
func (s *Server) change(do func(*meshagent.Agent, string) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := do(s.agent, r.PathValue("name")); err != nil {
			refuse(w, http.StatusConflict, err)
			return
		}
		answer(w, s.services())
	}
}

// drain answers when a service is drained. With hold the drain lasts until the caller hangs
// up, else until it is restored.
func (s *Server) drain(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, io.LimitReader(r.Body, maxBody)) // read to its end, or a hang-up is not noticed
	var within time.Duration
	if text := r.URL.Query().Get("within"); text != "" {
		var err error
		if within, err = time.ParseDuration(text); err != nil || within <= 0 || within > time.Hour {
			refuse(w, http.StatusBadRequest, fmt.Errorf("requests under way may take up to an hour, not %.40q", text))
			return
		}
	}
	name := r.PathValue("name")
	if !r.URL.Query().Has("hold") {
		if err := s.agent.Drain(r.Context(), name, within); err != nil {
			refuse(w, http.StatusConflict, err)
			return
		}
		answer(w, s.services())
		return
	}
	release, err := s.agent.HoldDrained(r.Context(), name, within)
	if err != nil {
		refuse(w, http.StatusConflict, err)
		return
	}
	defer release()
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return
	}
	<-r.Context().Done()
}
