package services

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
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// UnixPrefix begins the address of a service that listens on a unix socket; its path follows.
const UnixPrefix = "unix:"

// applicationHost stands in URLs for what dial connects with.
const applicationHost = "application"

// Kind is how a service is asked for its health.
type Kind string

const (
	ByTCP     Kind = "tcp"     // a connection is accepted
	ByHTTP    Kind = "http"    // GET, 2xx
	ByGRPC    Kind = "grpc"    // grpc.health.v1 says SERVING
	ByCommand Kind = "command" // exit code 0
)

// Check is how one service is checked. Checks can be compared.
type Check struct {
	Kind    Kind
	Target  string // path; name of a gRPC service; program and arguments, each with a zero behind it
	Address string // host:port that is asked, or UnixPrefix and a path
	Name    string // service name: the Host of HTTP and gRPC

	Interval, Timeout                    time.Duration
	HealthyThreshold, UnhealthyThreshold int
	InitiallyHealthy                     bool
	Limits                               Limits
}

// Limits are when requests that go wrong make an instance unhealthy.
type Limits struct {
	LocalOriginFailures, Fives int // in a row; 0: never
	BaseEjection, MaxEjection  time.Duration
}

// FromCatalogue is the check of a service as the catalogue has it: its health path, and
// what the agent's file says for all.
func FromCatalogue(name, address, healthPath string, t Thresholds) Check {
	c := Check{Kind: ByTCP, Address: address, Name: name}
	if service, ok := strings.CutPrefix(healthPath, "grpc:"); ok {
		c.Kind, c.Target = ByGRPC, service
	} else if healthPath != "" {
		c.Kind, c.Target = ByHTTP, healthPath
	}
	return c.with(t)
}

func (c Check) with(t Thresholds) Check {
	c.Interval, c.Timeout, c.HealthyThreshold, c.UnhealthyThreshold = t.Interval, t.Timeout, t.HealthyThreshold, t.UnhealthyThreshold
	o := t.OutlierDetection
	c.Limits = Limits{*o.ConsecutiveLocalOriginFailure, *o.Consecutive5xx, o.BaseEjectionTime, o.MaxEjectionTime}
	return c
}

// WithCommand is c with a command in the place of what it asks.
func (c Check) WithCommand(command []string) Check {
	c.Kind, c.Target = ByCommand, strings.Join(command, "\x00")+"\x00"
	return c
}

// With is c as a registration changes it.
func (c Check) With(h *Health, defaults Thresholds) Check {
	if h == nil {
		return c
	}
	switch {
	case h.HTTP != "":
		c.Kind, c.Target = ByHTTP, h.HTTP
	case h.TCP:
		c.Kind, c.Target = ByTCP, ""
	case h.GRPC != nil:
		c.Kind, c.Target = ByGRPC, h.GRPC.Service
	case len(h.Command) > 0:
		c = c.WithCommand(h.Command)
	}
	if host, _, err := net.SplitHostPort(c.Address); err == nil && h.Port != 0 {
		c.Address = net.JoinHostPort(host, strconv.Itoa(int(h.Port)))
	}
	c.InitiallyHealthy = h.Initial == "healthy"
	return c.with(h.Thresholds.or(defaults))
}

// String is the check as people write it.
func (c Check) String() string {
	switch c.Kind {
	case ByHTTP:
		return "http " + c.Target
	case ByGRPC:
		return strings.TrimSpace("grpc " + c.Target)
	case ByCommand:
		return "command " + strings.Join(c.argv(), " ")
	}
	return "tcp"
}

func (c Check) argv() []string {
	return strings.Split(strings.TrimSuffix(c.Target, "\x00"), "\x00")
}

// Watch checks an instance until ctx ends, and calls changed whenever its health is
// another one. probe makes one check; requests that go wrong count as well.
func (c Check) Watch(ctx context.Context, instance *Instance, probe func(context.Context, Check) error, changed func(err error)) {
	instance.limit(c.Limits)
	// A little longer or shorter for each, so that a host's services are not all checked
	// in one moment.
	ticker := time.NewTicker(c.Interval*19/20 + rand.N(c.Interval/10+1))
	defer ticker.Stop()
	first, good, ever := true, c.InitiallyHealthy, c.InitiallyHealthy
	goods, bads := 0, 0
	var until time.Time // it stays ejected until then
	set := func(now bool, err error) {
		differs := first || now != good
		good, ever = now, ever || now
		if instance.set(good, err); differs {
			changed(err)
		}
	}
	if c.InitiallyHealthy {
		set(true, nil)
	}
	for {
		limit, cancel := context.WithTimeout(ctx, c.Timeout)
		err := probe(limit, c)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if goods++; err != nil {
			goods = 0
		}
		if bads++; err == nil {
			bads = 0
		}
		switch {
		case good:
			set(bads < c.UnhealthyThreshold, err)
		case time.Now().Before(until):
		default:
			set(goods >= c.HealthyThreshold || goods > 0 && !ever, err)
		}
		first = false
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case e := <-instance.ejected:
			goods, until = 0, time.Now().Add(e.during)
			set(false, e.why)
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	}
}

// Prober makes checks.
type Prober struct{ http1, h2c *http.Transport }

// NewProber returns a prober. It makes a connection per check: an application that
// accepts no more connections is not healthy.
func NewProber() *Prober {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &Prober{
		&http.Transport{DialContext: dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		&http.Transport{DialContext: dial, DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, Protocols: protocols},
	}
}

// target is what a probe dials, and who is to be there.
type target struct {
	address string
	attest  func(net.Conn) error
}

type targetKey struct{}

// dial connects with the target of a probe.
func dial(ctx context.Context, _, _ string) (net.Conn, error) {
	to := ctx.Value(targetKey{}).(target)
	network, address := "tcp", to.address
	if path, ok := strings.CutPrefix(address, UnixPrefix); ok {
		network, address = "unix", path
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if to.attest != nil {
		if err := to.attest(conn); err != nil {
			conn.Close()
			return nil, err
		}
	}
	return conn, nil
}

// Probe makes one check: nil is good. attest is asked of each connection before anything is
// sent; nil: nobody is.
func (p *Prober) Probe(ctx context.Context, c Check, attest func(net.Conn) error) error {
	ctx = context.WithValue(ctx, targetKey{}, target{c.Address, attest})
	switch c.Kind {
	case ByCommand:
		return c.run(ctx)
	case ByGRPC:
		return p.askGRPC(ctx, c)
	case ByHTTP:
		return p.get(ctx, c)
	}
	conn, err := dial(ctx, "", "")
	if err != nil {
		return err
	}
	return conn.Close()
}

func (p *Prober) get(ctx context.Context, c Check) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+applicationHost+c.Target, nil)
	if err != nil {
		return err
	}
	request.Host = c.Name
	request.Header.Set("User-Agent", "entente-agent-health")
	answer, err := p.http1.RoundTrip(request)
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

// run runs the check's command in a process group of its own, which is killed as a whole
// when it takes too long. It gets nothing of the agent's environment, which may lead to
// secrets. What it prints is part of the error.
func (c Check) run(ctx context.Context) error {
	argv := c.argv()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "ENTENTE_SERVICE=" + c.Name, "ENTENTE_ADDRESS=" + c.Address}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	output := &beginning{}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("it did not end within %s", c.Timeout)
		}
		return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(string(output.text)))
	}
	return nil
}

// beginning keeps the first of what is written to it.
type beginning struct{ text []byte }

func (b *beginning) Write(p []byte) (int, error) {
	b.text = append(b.text, p[:min(len(p), 512-len(b.text))]...)
	return len(p), nil
}

// askGRPC is one call of grpc.health.v1.Health/Check, over HTTP/2 without TLS. The two
// messages of one field each are written and read here.
func (p *Prober) askGRPC(ctx context.Context, c Check) error {
	var message []byte
	if c.Target != "" {
		message = protowire.AppendString(protowire.AppendTag(message, 1, protowire.BytesType), c.Target)
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+applicationHost+"/grpc.health.v1.Health/Check", bytes.NewReader(append(frame, message...)))
	if err != nil {
		return err
	}
	request.Host = c.Name
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	answer, err := p.h2c.RoundTrip(request)
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
