package meshagent

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

func checker() *Agent {
	return &Agent{
		cfg:    &Config{Health: HealthConfig{Timeout: 2 * time.Second}, domain: spiffeid.RequireTrustDomainFromString("banking.example")},
		health: healthTransport(), grpcHealth: grpcTransport(),
	}
}

// A real gRPC server, asked as a whole and for one service.
func TestGRPCHealth(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	status := health.NewServer()
	status.SetServingStatus("bank.v1.Accounts", healthv1.HealthCheckResponse_SERVING)
	status.SetServingStatus("bank.v1.Loans", healthv1.HealthCheckResponse_NOT_SERVING)
	server := grpc.NewServer()
	healthv1.RegisterHealthServer(server, status)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	a := checker()
	for name, want := range map[string]string{"": "", "bank.v1.Accounts": "", "bank.v1.Loans": "not 1 (SERVING)", "bank.v1.Nobody": `gRPC status "5"`} {
		err := a.check(t.Context(), checked{name: "accounts", grpc: name, byGRPC: true, addr: l.Addr().String()})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", name, err)
		}
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0") // accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	a.cfg.Health.Timeout = 100 * time.Millisecond
	if err := a.check(t.Context(), checked{name: "x", byGRPC: true, addr: plain.Addr().String()}); err == nil {
		t.Error("a server that speaks no gRPC is healthy")
	}
}

func TestCommandHealth(t *testing.T) {
	a := checker()
	run := func(ctx context.Context, command ...string) error {
		return a.check(ctx, checked{name: "x", command: strings.Join(command, "\x00") + "\x00", addr: "127.0.0.1:1"})
	}
	if err := run(t.Context(), "/bin/sh", "-c", "exit 0"); err != nil {
		t.Error(err)
	}
	if err := run(t.Context(), "/bin/sh", "-c", "echo queue is full; exit 2"); err == nil || !strings.Contains(err.Error(), "queue is full") {
		t.Errorf("%v", err)
	}
	if err := run(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a program that is not there is healthy")
	}
	a.cfg.Health.Timeout = 50 * time.Millisecond
	if err := run(t.Context(), "/bin/sh", "-c", "exec sleep 30"); err == nil {
		t.Error("a command that does not end is healthy")
	}
}

func FuzzParseHealth(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{1, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 6, 0x12, 2, 'h', 'i', 8, 2})
	f.Fuzz(func(t *testing.T, body []byte) {
		status, err := parseHealth(body)
		if err != nil && status == serving && len(body) < 7 {
			t.Errorf("%x is %d", body, status)
		}
		if err == nil && (len(body) < 5 || body[0] != 0) {
			t.Errorf("%x was read", body)
		}
	})
}
