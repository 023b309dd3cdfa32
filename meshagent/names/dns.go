package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"

	"github.com/entente-mesh/entente/internal/daemon"
)

const (
	ttl     = 5 // seconds; an answer outlives its service no longer
	maxUDP  = 1232
	idle    = 10 * time.Second // of a TCP connection
	maxConn = 64               // TCP connections at a time: a resolver needs one
)

// Server answers DNS questions from a table, on loopback only, and asks nobody.
type Server struct {
	table *Table
	udp   net.PacketConn
	tcp   net.Listener
	log   *slog.Logger
}

// Listen opens UDP and TCP at a loopback address.
func Listen(table *Table, address string, log *slog.Logger) (*Server, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().IsLoopback() {
		return nil, fmt.Errorf("dns.listen %q is not a loopback address and port, as in 127.80.0.1:53", address)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	tcp, err := daemon.Listen(address)
	if err == nil {
		address = tcp.Addr().String() // with the real port if 0 was asked for
		var udp net.PacketConn
		if udp, err = daemon.ListenPacket(address); err == nil {
			return &Server{table, udp, tcp, log}, nil
		}
		tcp.Close()
	}
	switch {
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("no permission to answer DNS at %s: grant CAP_NET_BIND_SERVICE, or choose a port of 1024 or above: %w", address, err)
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("another DNS server answers at %s: set dns.listen to another address of loopback: %w", address, err)
	}
	return nil, fmt.Errorf("cannot answer DNS at %s: %w", address, err)
}

// Addr is where it listens.
func (s *Server) Addr() string { return s.tcp.Addr().String() }

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, question *dns.Msg) {
		answer := s.table.Answer(question)
		if answer == nil {
			return
		}
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			size := dns.MinMsgSize
			if opt := question.IsEdns0(); opt != nil {
				size = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDP)
			}
			answer.Truncate(size)
		}
		w.WriteMsg(answer)
	})
	servers := []*dns.Server{
		{PacketConn: s.udp, Handler: handler, UDPSize: maxUDP},
		{Listener: limit(s.tcp, maxConn), Handler: handler, ReadTimeout: idle, IdleTimeout: func() time.Duration { return idle }, MaxTCPQueries: 1024},
	}
	ended := make(chan error, len(servers))
	var started sync.WaitGroup
	for _, server := range servers {
		started.Add(1)
		server.NotifyStartedFunc = started.Done
		go func() { ended <- server.ActivateAndServe() }()
	}
	var err error
	left := len(servers)
	select {
	case <-ctx.Done():
		started.Wait() // a server that has not begun cannot be stopped
		err = ctx.Err()
	case first := <-ended:
		left--
		err = fmt.Errorf("the DNS server has ended: %w", errors.Join(first, errors.New("it was not asked to")))
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for _, server := range servers {
		server.ShutdownContext(stop)
	}
	s.udp.Close()
	s.tcp.Close()
	for range left {
		<-ended
	}
	return err
}

// Answer makes the response to a question, nil if none is due. It denies names of the
// trust domains it knows that no service has, and refuses all others, so that a
// resolver asks elsewhere.
func (t *Table) Answer(question *dns.Msg) *dns.Msg {
	if question.Response {
		return nil // an answer to an answer would go round for ever
	}
	answer := new(dns.Msg)
	answer.SetReply(question)
	answer.RecursionAvailable = false
	if opt := question.IsEdns0(); opt != nil {
		answer.SetEdns0(maxUDP, false)
		if opt.Version() != 0 {
			answer.Rcode = dns.RcodeBadVers
			return answer
		}
	}
	if question.Opcode != dns.OpcodeQuery {
		answer.Rcode = dns.RcodeNotImplemented
		return answer
	}
	if len(question.Question) != 1 {
		answer.Rcode = dns.RcodeFormatError
		return answer
	}
	q := question.Question[0]
	if q.Qclass != dns.ClassINET {
		answer.Rcode = dns.RcodeRefused
		return answer
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
	if addr, ok := reverseName(name); ok {
		t.answerReverse(answer, q, addr)
		return answer
	}
	addr, zone := t.lookup(name)
	switch {
	case zone == "":
		answer.Rcode = dns.RcodeRefused
		return answer
	case !addr.IsValid() && name != zone:
		answer.Rcode = dns.RcodeNameError
	case addr.IsValid() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
		answer.Answer = []dns.RR{&dns.A{Hdr: header(q.Name, dns.TypeA), A: addr.AsSlice()}}
	case name == zone && q.Qtype == dns.TypeSOA:
		answer.Answer = []dns.RR{soa(zone)}
	}
	answer.Authoritative = true
	if len(answer.Answer) == 0 {
		answer.Ns = []dns.RR{soa(zone)} // how long the denial holds
	}
	return answer
}

func (t *Table) answerReverse(answer *dns.Msg, q dns.Question, addr netip.Addr) {
	name, ours := t.reverse(addr)
	switch {
	case !ours:
		answer.Rcode = dns.RcodeRefused
	case name == "":
		answer.Authoritative, answer.Rcode = true, dns.RcodeNameError
	case q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY:
		answer.Authoritative = true
		answer.Answer = []dns.RR{&dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: dns.Fqdn(name)}}
	default:
		answer.Authoritative = true
	}
}

// reverseName reads 4.3.2.1.in-addr.arpa.
func reverseName(name string) (netip.Addr, bool) {
	rest, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	labels := strings.Split(rest, ".")
	var b [4]byte
	if len(labels) != len(b) {
		return netip.Addr{}, true // not ours, whatever it is
	}
	for i, label := range labels {
		n, err := strconv.ParseUint(label, 10, 8)
		if err != nil || strconv.FormatUint(n, 10) != label {
			return netip.Addr{}, true
		}
		b[len(b)-1-i] = byte(n)
	}
	return netip.AddrFrom4(b), true
}

func header(name string, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: ttl}
}

func soa(zone string) dns.RR {
	return &dns.SOA{
		Hdr: header(dns.Fqdn(zone), dns.TypeSOA), Ns: "entente.invalid.", Mbox: "entente.invalid.",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: ttl,
	}
}

// limit closes connections beyond n.
func limit(l net.Listener, n int) net.Listener {
	return &limited{Listener: l, free: make(chan struct{}, n)}
}

type limited struct {
	net.Listener
	free chan struct{} // holds one thing for each open connection
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.free <- struct{}{}:
			return &counted{Conn: conn, done: sync.OnceFunc(func() { <-l.free })}, nil
		default:
			conn.Close()
		}
	}
}

type counted struct {
	net.Conn
	done func()
}

func (c *counted) Close() error {
	defer c.done()
	return c.Conn.Close()
}
