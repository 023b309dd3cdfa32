package meshagent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/client"
)

// riseAfter is how many good checks in a row make an instance healthy again that
// was healthy before. The first good one of all is enough, and so is each bad one.
const riseAfter = 2

// checked is a service of this host and how it is to be checked.
type checked struct {
	name    string
	url     string // HTTP GET, 2xx is good
	grpc    string // name of a gRPC service, asked with gRPC's health protocol
	byGRPC  bool
	command string // program and arguments, each with a zero behind it; exit code 0 is good
	addr    string // with nothing else: a TCP connect is good
}

// watchHealth checks every service of this host that listens, and reports them as
// instances. One goroutine per service; all have ended when it returns.
func (a *Agent) watchHealth(ctx context.Context) error {
	var mu sync.Mutex
	healthy := map[string]bool{}
	changed := make(chan struct{}, 1)

	var checks sync.WaitGroup
	running := map[checked]context.CancelFunc{}
	defer checks.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	for {
		state := a.State()
		services := a.services(state)
		for c, stop := range running {
			if !slices.Contains(services, c) {
				stop()
				delete(running, c)
			}
		}
		for _, c := range services {
			if running[c] != nil {
				continue
			}
			checkCtx, stop := context.WithCancel(ctx)
			running[c] = stop
			checks.Go(func() {
				a.watchService(checkCtx, c, func(good bool) {
					mu.Lock()
					defer mu.Unlock()
					if checkCtx.Err() == nil {
						healthy[c.name] = good
						select {
						case changed <- struct{}{}:
						default:
						}
					}
				})
			})
		}
		if state.Ready {
			mu.Lock()
			instances := make([]client.Instance, 0, len(services))
			for _, c := range services {
				instances = append(instances, client.Instance{
					Service: c.name, Agent: a.cfg.Name, Datacenter: a.cfg.Datacenter,
					Address: a.cfg.Sidecar.Advertise, Healthy: healthy[c.name],
				})
			}
			mu.Unlock()
			a.report(instances)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-state.Changed():
		case <-changed:
		}
	}
}

// services are the host's services that listen, by name: those of which it holds
// the entry.
func (a *Agent) services(state *State) []checked {
	var list []checked
	for _, object := range state.View.Objects {
		s := object.GetService()
		if s == nil {
			continue
		}
		addr, err := a.cfg.App(s.GetPort())
		if _, here := state.Identity(ca.ServiceEntry(s.GetName())); !here || err != nil {
			continue
		}
		c := checked{name: s.GetName(), addr: addr}
		if command := a.cfg.Health.Commands[c.name]; len(command) > 0 {
			c.command = strings.Join(command, "\x00") + "\x00"
		} else if c.grpc, c.byGRPC = strings.CutPrefix(s.GetHealthPath(), "grpc:"); !c.byGRPC {
			c.grpc, c.url = "", healthURL(s, c.addr)
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(x, y checked) int { return cmp.Compare(x.name, y.name) })
	return list
}

func healthURL(s *statev1.Service, addr string) string {
	if s.GetHealthPath() == "" {
		return ""
	}
	return "http://" + addr + s.GetHealthPath()
}

// watchService checks one service until ctx ends, and tells what changes.
func (a *Agent) watchService(ctx context.Context, c checked, tell func(good bool)) {
	// A little longer or shorter for each, so that a host's services are not all
	// checked in one moment.
	ticker := time.NewTicker(a.cfg.Health.Interval*19/20 + rand.N(a.cfg.Health.Interval/10+1))
	defer ticker.Stop()
	first, ever, good, streak := true, false, false, 0
	for {
		err := a.check(ctx, c)
		if ctx.Err() != nil {
			return
		}
		streak++
		if err != nil {
			streak = 0
		}
		now := err == nil && (good || !ever || streak >= riseAfter)
		if first || now != good {
			tell(now)
			if !first || !now {
				a.log.Info("health", "service", c.name, "address", c.addr, "healthy", now, "error", err)
			}
		}
		good, ever, first = now, ever || now, false
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// check makes one check.
func (a *Agent) check(ctx context.Context, c checked) error {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Health.Timeout)
	defer cancel()
	switch {
	case c.command != "":
		return checkCommand(ctx, strings.Split(strings.TrimSuffix(c.command, "\x00"), "\x00"))
	case c.byGRPC:
		return a.checkGRPC(ctx, c)
	case c.url == "":
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.addr)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return err
	}
	request.Host = ca.ServiceName(c.name, a.cfg.Domain())
	request.Header.Set("User-Agent", "entente-agent-health")
	answer, err := a.health.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return fmt.Errorf("it answers %s", answer.Status)
	}
	_, err = io.CopyN(io.Discard, answer.Body, 64<<10)
	if err == io.EOF {
		err = nil
	}
	return err
}

// healthTransport makes a connection per check: an application that accepts no
// more connections is not healthy.
func healthTransport() *http.Transport {
	return &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10}
}

// checkCommand runs a command of the agent's file. What it prints is part of the error.
func checkCommand(ctx context.Context, command []string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.WaitDelay = time.Second
	output := &beginning{}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", command[0], err, strings.TrimSpace(string(output.text)))
	}
	return nil
}

// beginning keeps the first of what is written to it.
type beginning struct{ text []byte }

func (b *beginning) Write(p []byte) (int, error) {
	b.text = append(b.text, p[:min(len(p), 512-len(b.text))]...)
	return len(p), nil
}

// checkGRPC is one call of grpc.health.v1.Health/Check, over HTTP/2 without TLS. The
// two messages of one field each are written and read here.
func (a *Agent) checkGRPC(ctx context.Context, c checked) error {
	var message []byte
	if c.grpc != "" {
		message = protowire.AppendString(protowire.AppendTag(message, 1, protowire.BytesType), c.grpc)
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+c.addr+"/grpc.health.v1.Health/Check", bytes.NewReader(append(frame, message...)))
	if err != nil {
		return err
	}
	request.Host = ca.ServiceName(c.name, a.cfg.Domain())
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	answer, err := a.grpcHealth.RoundTrip(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
	if err != nil {
		return err
	}
	code := cmp.Or(answer.Trailer.Get("Grpc-Status"), answer.Header.Get("Grpc-Status"))
	if answer.StatusCode != http.StatusOK || code != "0" {
		return fmt.Errorf("it answers %s, gRPC status %q", answer.Status, code)
	}
	state, err := parseHealth(body)
	if err != nil {
		return err
	}
	if state != serving {
		return fmt.Errorf("its health is %d, not 1 (SERVING)", state)
	}
	return nil
}

const serving = 1

// parseHealth reads a framed HealthCheckResponse: field 1 is the status.
func parseHealth(body []byte) (status uint64, err error) {
	if len(body) < 5 || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-5) {
		return 0, errors.New("its health is not one uncompressed gRPC message")
	}
	for rest := body[5:]; len(rest) > 0; {
		number, kind, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return 0, fmt.Errorf("its health cannot be read: %w", protowire.ParseError(n))
		}
		rest = rest[n:]
		if number == 1 && kind == protowire.VarintType {
			if status, n = protowire.ConsumeVarint(rest); n < 0 {
				return 0, fmt.Errorf("its health cannot be read: %w", protowire.ParseError(n))
			}
		} else if n = protowire.ConsumeFieldValue(number, kind, rest); n < 0 {
			return 0, fmt.Errorf("its health cannot be read: %w", protowire.ParseError(n))
		}
		rest = rest[n:]
	}
	return status, nil
}

// grpcTransport is healthTransport for HTTP/2 without TLS.
func grpcTransport() *http.Transport {
	t := healthTransport()
	t.Protocols = new(http.Protocols)
	t.Protocols.SetUnencryptedHTTP2(true)
	return t
}
