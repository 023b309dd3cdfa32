package names

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

var services = []string{"accounts.banking.example", "ledger.banking.example", "prices.trading.example"}

func open(t *testing.T, file string) *Table {
	t.Helper()
	table, err := Open(DefaultNetwork, file, "banking.example", nil)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// An address stays with its name: over restarts, other names, and absence.
func TestAddressesAreStable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "names.json")
	first := open(t, file).Assign(services)
	if len(first) != len(services) {
		t.Fatalf("%v", first)
	}
	seen := map[netip.Addr]bool{}
	for name, addr := range first {
		if b := addr.As4(); !DefaultNetwork.Contains(addr) || b[2] == 0 || b[3] == 0 || b[3] == 255 || seen[addr] {
			t.Errorf("%s: %v", name, addr)
		}
		seen[addr] = true
	}
	table := open(t, file)
	if got := table.Assign(services[:1]); len(got) != 1 || got[services[0]] != first[services[0]] {
		t.Errorf("after a restart: %v", got)
	}
	// A crowd that has every other address does not take one that was given.
	crowd := append([]string{}, services...)
	for i := range 3000 {
		crowd = append(crowd, fmt.Sprintf("s%d.banking.example", i))
	}
	all := table.Assign(crowd)
	for _, name := range services {
		if all[name] != first[name] {
			t.Errorf("%s moved to %v", name, all[name])
		}
	}
	addresses := map[netip.Addr]string{}
	for name, addr := range all {
		if other := addresses[addr]; other != "" {
			t.Fatalf("%s and %s have %v", name, other, addr)
		}
		addresses[addr] = name
	}
	again := open(t, file).Assign(crowd)
	for name, addr := range all {
		if again[name] != addr {
			t.Fatalf("%s moved from %v to %v", name, addr, again[name])
		}
	}
	// Without the file most are the same: the name decides.
	if got := open(t, filepath.Join(t.TempDir(), "x")).Assign(services); got[services[0]] != first[services[0]] {
		t.Errorf("on another host: %v", got)
	}
}

func TestFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "names.json")
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(DefaultNetwork, file, "banking.example", nil); err == nil {
		t.Error("a broken file was read")
	}
	// An address outside of the network, or of two names, is not taken up.
	if err := os.WriteFile(file, []byte(`{"a.banking.example":"8.8.8.8","b.banking.example":"127.80.9.9","c.banking.example":"127.80.9.9"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	got := open(t, file).Assign([]string{"a.banking.example", "b.banking.example", "c.banking.example"})
	if !DefaultNetwork.Contains(got["a.banking.example"]) || got["b.banking.example"] != netip.MustParseAddr("127.80.9.9") || got["c.banking.example"] == got["b.banking.example"] {
		t.Errorf("%v", got)
	}
	for _, bad := range []string{"10.0.0.0/16", "127.80.0.0/8", "127.80.1.0/16", "::1/128"} {
		if CheckNetwork(netip.MustParsePrefix(bad)) == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}

func ask(name string, kind uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, kind) }

func TestAnswer(t *testing.T) {
	table := open(t, filepath.Join(t.TempDir(), "names.json"))
	given := table.Assign(services)
	accounts := given[services[0]]
	for _, test := range []struct {
		name  string
		kind  uint16
		rcode int
		want  string // of the one answer; empty: none
	}{
		{"accounts.banking.example.", dns.TypeA, dns.RcodeSuccess, accounts.String()},
		{"ACCounts.Banking.Example.", dns.TypeA, dns.RcodeSuccess, accounts.String()},
		{"prices.trading.example.", dns.TypeA, dns.RcodeSuccess, given[services[2]].String()},
		{"accounts.banking.example.", dns.TypeANY, dns.RcodeSuccess, accounts.String()},
		{"accounts.banking.example.", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{"accounts.banking.example.", dns.TypeMX, dns.RcodeSuccess, ""},
		{"nobody.banking.example.", dns.TypeA, dns.RcodeNameError, ""},
		{"x.accounts.banking.example.", dns.TypeA, dns.RcodeNameError, ""},
		{"nobody.trading.example.", dns.TypeA, dns.RcodeNameError, ""},
		{"banking.example.", dns.TypeA, dns.RcodeSuccess, ""},
		{"banking.example.", dns.TypeSOA, dns.RcodeSuccess, "entente.invalid."},
		{"xbanking.example.", dns.TypeA, dns.RcodeRefused, ""},
		{"example.", dns.TypeA, dns.RcodeRefused, ""},
		{".", dns.TypeA, dns.RcodeRefused, ""},
		{"golang.org.", dns.TypeA, dns.RcodeRefused, ""},
		{reverse(accounts), dns.TypePTR, dns.RcodeSuccess, "accounts.banking.example."},
		{"1.9.80.127.in-addr.arpa.", dns.TypePTR, dns.RcodeNameError, ""},
		{"1.0.0.127.in-addr.arpa.", dns.TypePTR, dns.RcodeRefused, ""},
		{"x.in-addr.arpa.", dns.TypePTR, dns.RcodeRefused, ""},
	} {
		q := ask(test.name, test.kind)
		a := table.Answer(q)
		got := ""
		if len(a.Answer) > 0 {
			switch rr := a.Answer[0].(type) {
			case *dns.A:
				got = rr.A.String()
			case *dns.PTR:
				got = rr.Ptr
			case *dns.SOA:
				got = rr.Ns
			}
		}
		if a.Rcode != test.rcode || got != test.want || a.Id != q.Id || !a.Response || a.Question[0].Name != test.name || a.RecursionAvailable {
			t.Errorf("%s %s: %s %q", test.name, dns.TypeToString[test.kind], dns.RcodeToString[a.Rcode], got)
		}
		if a.Authoritative && test.want == "" && strings.HasSuffix(test.name, ".example.") && len(a.Ns) != 1 {
			t.Errorf("%s: the denial does not say how long it holds", test.name)
		}
		if _, err := a.Pack(); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	for name, change := range map[string]func(*dns.Msg){
		"an update":     func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate },
		"no question":   func(m *dns.Msg) { m.Question = nil },
		"two questions": func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"chaos":         func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS },
		"EDNS 1":        func(m *dns.Msg) { m.SetEdns0(4096, false); m.IsEdns0().SetVersion(1) },
	} {
		q := ask("accounts.banking.example.", dns.TypeA)
		change(q)
		if a := table.Answer(q); a == nil || a.Rcode == dns.RcodeSuccess || len(a.Answer) > 0 {
			t.Errorf("%s: %v", name, a)
		}
	}
	q := ask("accounts.banking.example.", dns.TypeA)
	q.Response = true
	if table.Answer(q) != nil {
		t.Error("an answer was answered")
	}
	// A service that is gone is denied.
	table.Assign(nil)
	if a := table.Answer(ask("accounts.banking.example.", dns.TypeA)); a.Rcode != dns.RcodeNameError {
		t.Errorf("a service that is gone: %v", a)
	}
}

func reverse(addr netip.Addr) string {
	name, err := dns.ReverseAddr(addr.String())
	if err != nil {
		panic(err)
	}
	return name
}

// Over the network, with the resolver that programs use.
func TestServer(t *testing.T) {
	table := open(t, filepath.Join(t.TempDir(), "names.json"))
	given := table.Assign(services)
	s, err := Listen(table, "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	for _, network := range []string{"udp", "tcp"} {
		r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, s.Addr())
		}}
		addrs, err := r.LookupNetIP(t.Context(), "ip4", services[0])
		if err != nil || len(addrs) != 1 || addrs[0].Unmap() != given[services[0]] {
			t.Errorf("%s: %v %v", network, addrs, err)
		}
		var missing *net.DNSError
		if _, err := r.LookupNetIP(t.Context(), "ip4", "nobody.banking.example"); err == nil {
			t.Errorf("%s: nobody has an address", network)
		} else if missing, _ = err.(*net.DNSError); missing == nil || !missing.IsNotFound {
			t.Errorf("%s: %v", network, err)
		}
	}
	if _, err := Listen(table, s.Addr(), nil); err == nil || !strings.Contains(err.Error(), "dns.listen") {
		t.Errorf("an address in use: %v", err)
	}
	for _, bad := range []string{"0.0.0.0:53", "10.0.0.1:53", "localhost:53", "127.0.0.1"} {
		if _, err := Listen(table, bad, nil); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
	cancel()
	if err := <-ended; err != context.Canceled {
		t.Error(err)
	}
}

// Whatever a packet holds, the answer can be sent, echoes the question, and gives an
// address for nothing but a known service.
func FuzzAnswer(f *testing.F) {
	for _, q := range []*dns.Msg{ask("accounts.banking.example.", dns.TypeA), ask("x.banking.example.", dns.TypeAAAA), ask("1.9.80.127.in-addr.arpa.", dns.TypePTR)} {
		q.SetEdns0(4096, true)
		packed, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed)
	}
	table, err := Open(DefaultNetwork, filepath.Join(f.TempDir(), "names.json"), "banking.example", nil)
	if err != nil {
		f.Fatal(err)
	}
	given := table.Assign(services)
	f.Fuzz(func(t *testing.T, packet []byte) {
		q := new(dns.Msg)
		if q.Unpack(packet) != nil {
			return
		}
		a := table.Answer(q)
		if a == nil {
			return
		}
		if a.Id != q.Id || !a.Response {
			t.Errorf("%v", a)
		}
		a.Truncate(dns.MinMsgSize)
		if _, err := a.Pack(); err != nil && len(q.Question) == 1 {
			t.Errorf("cannot be sent: %v", err)
		}
		for _, rr := range a.Answer {
			if is, ok := rr.(*dns.A); ok {
				name := strings.ToLower(strings.TrimSuffix(is.Hdr.Name, "."))
				if want, known := given[name]; !known || want.String() != is.A.String() {
					t.Errorf("%s is at %s", name, is.A)
				}
			}
		}
	})
}
