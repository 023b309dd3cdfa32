package platform

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/scenarios/load"
)

// Identity is what a process holds of one SPIFFE ID, as it got it from the
// Workload API.
type Identity struct {
	ID       string    `json:"id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"not_after"`
	Received time.Time `json:"received"`
	Renewals int       `json:"renewals"` // how often a newer one replaced it
	Verified bool      `json:"verified"` // by go-spiffe, with the bundle that came with it
}

// identities follow the Workload API, as any SPIFFE client does.
type identities struct {
	log *slog.Logger

	mu   sync.Mutex
	list map[string]Identity
	svid map[string]*x509svid.SVID
}

func watchIdentities(group *daemon.Group, socket string, log *slog.Logger) *identities {
	w := &identities{log: log, list: map[string]Identity{}, svid: map[string]*x509svid.SVID{}}
	group.Go("workload API", func(ctx context.Context) error {
		err := workloadapi.WatchX509Context(ctx, w, workloadapi.WithAddr("unix://"+socket))
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("the Workload API at %s: %w", socket, err)
	})
	return w
}

// OnX509ContextUpdate replaces what was known.
func (w *identities) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	list, svids := map[string]Identity{}, map[string]*x509svid.SVID{}
	for _, svid := range c.SVIDs {
		leaf := svid.Certificates[0]
		now := Identity{ID: svid.ID.String(), Serial: leaf.SerialNumber.Text(16), NotAfter: leaf.NotAfter, Received: time.Now()}
		id, _, err := x509svid.Verify(svid.Certificates, c.Bundles)
		now.Verified = err == nil && id == svid.ID
		if before, ok := w.list[now.ID]; ok {
			if now.Renewals = before.Renewals; before.Serial == now.Serial {
				now.Received = before.Received
			} else {
				now.Renewals++
			}
		}
		list[now.ID], svids[now.ID] = now, svid
	}
	w.list, w.svid = list, svids
}

// OnX509ContextWatchError is told when the agent cannot be reached, or refuses; the
// watch goes on, and what is held stays.
func (w *identities) OnX509ContextWatchError(err error) {
	w.log.Info("Workload API does not answer", "error", err)
}

func (w *identities) all() []Identity {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]Identity, 0, len(w.list))
	for _, identity := range w.list {
		list = append(list, identity)
	}
	return list
}

// certificate is the SVID of an ID in the shape of crypto/tls.
func (w *identities) certificate(id string) (tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	svid := w.svid[id]
	if svid == nil {
		return tls.Certificate{}, fmt.Errorf("the Workload API gave this process no SVID of %s", id)
	}
	c := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, cert := range svid.Certificates {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c, nil
}

// The runner's orders, as JSON over the control socket.
type (
	// CallOrder: make one request as a service.
	CallOrder struct {
		As     string `json:"as"` // service name
		Method string `json:"method"`
		URL    string `json:"url"`
	}
	// Called is its answer.
	Called struct {
		Status int         `json:"status"`
		Header http.Header `json:"header"`
		Body   []byte      `json:"body"`
		Error  string      `json:"error"` // no answer at all
	}
	// DialOrder: open a TLS connection with the process's SVID of an ID, and ask something.
	DialOrder struct {
		ID         string `json:"id"`
		Address    string `json:"address"`
		ServerName string `json:"server_name"`
	}
	// LoadOrder: send requests at a constant rate until the body, which goes on after the order, ends.
	LoadOrder struct {
		As       string        `json:"as"`
		Method   string        `json:"method"`
		URL      string        `json:"url"`
		Rate     float64       `json:"rate"` // per second
		Deadline time.Duration `json:"deadline"`
	}
)

func controlHandler(services map[string]*service, ids *identities) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ready\n") })
	mux.HandleFunc("GET /identities", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, ids.all()) })
	mux.HandleFunc("POST /call", func(w http.ResponseWriter, r *http.Request) {
		var order CallOrder
		if s := caller(w, r, services, &order, func() string { return order.As }); s != nil {
			writeJSON(w, s.call(r.Context(), order))
		}
	})
	mux.HandleFunc("POST /dial", func(w http.ResponseWriter, r *http.Request) {
		var order DialOrder
		if !readOrder(w, r, &order) {
			return
		}
		certificate, err := ids.certificate(order.ID)
		if err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		writeJSON(w, Dial(r.Context(), order.Address, order.ServerName, certificate))
	})
	mux.HandleFunc("POST /load", func(w http.ResponseWriter, r *http.Request) {
		var order LoadOrder
		if s := caller(w, r, services, &order, func() string { return order.As }); s != nil {
			s.load(w, r, order)
		}
	})
	return mux
}

func readOrder(w http.ResponseWriter, r *http.Request, order any) bool {
	if err := json.NewDecoder(r.Body).Decode(order); err != nil {
		http.Error(w, "no order: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// caller reads an order and finds the service that shall carry it out.
func caller(w http.ResponseWriter, r *http.Request, services map[string]*service, order any, as func() string) *service {
	if !readOrder(w, r, order) {
		return nil
	}
	s := services[as()]
	if s == nil || s.others == nil {
		http.Error(w, fmt.Sprintf("this process has no service %q that calls others", as()), http.StatusConflict)
		return nil
	}
	return s
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func (s *service) call(ctx context.Context, order CallOrder) (answer Called) {
	request, err := http.NewRequestWithContext(ctx, order.Method, order.URL, nil)
	if err != nil {
		return Called{Error: err.Error()}
	}
	response, err := s.others.Do(request)
	if err != nil {
		return Called{Error: err.Error()}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return Called{Error: err.Error()}
	}
	return Called{Status: response.StatusCode, Header: response.Header, Body: body}
}

// load streams a sample per line until the body of the order ends, and then those of
// the requests that are still out.
func (s *service) load(w http.ResponseWriter, r *http.Request, order LoadOrder) {
	controller := http.NewResponseController(w)
	if err := controller.EnableFullDuplex(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/jsonl")
	w.WriteHeader(http.StatusOK)
	controller.Flush()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	go func() {
		io.Copy(io.Discard, r.Body)
		cancel()
	}()
	lines := json.NewEncoder(w)
	err := load.Open(ctx, order.Rate, order.Deadline,
		func(ctx context.Context, _ int) load.Sample { return s.sample(ctx, order) },
		func(sample load.Sample) {
			lines.Encode(sample)
			controller.Flush()
		})
	if err != nil {
		lines.Encode(load.Sample{Error: err.Error()})
	}
}

func (s *service) sample(ctx context.Context, order LoadOrder) load.Sample {
	var wrote atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteHeaders: func() { wrote.Store(true) }})
	answer := s.call(ctx, CallOrder{Method: order.Method, URL: order.URL})
	if answer.Error != "" {
		return load.Sample{Attempts: 1, Unknown: wrote.Load(), Error: reason(ctx, answer.Error)}
	}
	return Judge(answer.Status, answer.Header, answer.Body)
}

// reason makes an error short and countable.
func reason(ctx context.Context, err string) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "no answer within the deadline"
	}
	return err
}

// Judge turns an answer into a sample: good is a 200 that says which datacenters made it.
func Judge(status int, header http.Header, body []byte) load.Sample {
	sample := load.Sample{Attempts: 1, RequestID: header.Get("X-Request-Id")}
	if status != http.StatusOK {
		sample.Error = fmt.Sprintf("status %d", status)
		if refused := header.Get("Entente-Refused"); refused != "" {
			sample.Error += " " + refused
		}
		var a Answer
		if json.Unmarshal(body, &a) == nil && a.Error != "" {
			sample.Error += " " + a.Error
		}
		sample.Unknown = header.Get("Entente-Outcome") == "unknown"
		return sample
	}
	var a Answer
	if err := json.Unmarshal(body, &a); err != nil || a.Datacenter == "" {
		sample.Error = "the answer does not say where it was made"
		return sample
	}
	sample.OK, sample.ServedBy = true, a.ServedBy()
	return sample
}

// Dialled is how a bare TLS dial ended.
type Dialled struct {
	Accepted bool   `json:"accepted"` // the server answered the request
	ByTLS    bool   `json:"by_tls"`   // refused with a TLS alert
	Detail   string `json:"detail"`
}

// Time in which a server that does not like a certificate says so.
const alertTime = 500 * time.Millisecond

// Dial opens a TLS 1.3 connection with a certificate and asks for something. It does
// not verify the server: this is the attacker, who takes any. In TLS 1.3 a client
// learns only from its first read that its certificate was not accepted; it waits for
// that before it sends anything, since a server that closes with bytes unread resets
// the connection and may lose its own alert.
func Dial(ctx context.Context, address, serverName string, certificate tls.Certificate) Dialled {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{
		Certificates:       []tls.Certificate{certificate},
		InsecureSkipVerify: true,
		ServerName:         serverName,
		NextProtos:         []string{"http/1.1"},
		MinVersion:         tls.VersionTLS13,
	}}
	fail := func(err error) Dialled {
		var op *net.OpError
		return Dialled{ByTLS: errors.As(err, &op) && op.Op == "remote error", Detail: err.Error()}
	}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(alertTime))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		if err == nil {
			err = errors.New("the server spoke first")
		}
		return fail(err)
	}
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", serverName)
	answer, err := io.ReadAll(io.LimitReader(conn, 64<<10))
	if len(answer) == 0 {
		if err == nil {
			err = errors.New("the server closed the connection without an alert")
		}
		return fail(err)
	}
	first, _, _ := bytes.Cut(answer, []byte("\r\n"))
	return Dialled{Accepted: bytes.HasPrefix(answer, []byte("HTTP/1.1 ")), Detail: string(first)}
}
