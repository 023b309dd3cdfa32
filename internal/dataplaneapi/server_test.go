package dataplaneapi

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/internal/daemon"
)

// process is a gateway that says what it was asked, when it may.
type process struct {
	asked chan struct{} // nil: answers at once
	hold  chan struct{}
}

func (p *process) Status(r *ententev1.DataPlaneStatusRequest) *ententev1.DataPlaneStatusResponse {
	if p.asked != nil {
		p.asked <- struct{}{}
		<-p.hold
	}
	return &ententev1.DataPlaneStatusResponse{Kind: "gateway", Name: "gw-1", NotReady: r.GetService()}
}

// local serves a process on a unix socket.
func local(t *testing.T, p Process) (socket string, log *bytes.Buffer) {
	t.Helper()
	socket, log = filepath.Join(t.TempDir(), "a.sock"), &bytes.Buffer{}
	listener, err := daemon.ListenUnix(socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- New(p, slog.New(slog.NewTextHandler(log, nil)), nil).ServeLocal(ctx, listener) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != context.Canceled {
			t.Error(err)
		}
	})
	return socket, log
}

func dial(t *testing.T, socket string) ententev1.DataPlaneClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return ententev1.NewDataPlaneClient(conn)
}

func TestEveryMethodHasARow(t *testing.T) {
	listed := map[string]bool{}
	services := ententev1.File_entente_v1_dataplane_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			name := fmt.Sprintf("/%s/%s", services.Get(i).FullName(), services.Get(i).Methods().Get(j).Name())
			if listed[name] = true; methods[name] == (method{}) {
				t.Errorf("%s has no row: it is refused to everybody", name)
			}
		}
	}
	for name := range methods {
		if !listed[name] {
			t.Errorf("%s has a row, and the API has no such method", name)
		}
	}
}

// What has no row is refused, to the operator as well.
func TestDeniedByDefault(t *testing.T) {
	socket, log := local(t, &process{})
	client := dial(t, socket)
	s, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{Service: "accounts.banking.example"})
	if err != nil || s.GetName() != "gw-1" || s.GetNotReady() != "accounts.banking.example" {
		t.Fatalf("control: %v, %v", s, err)
	}
	row := methods[ententev1.DataPlane_Status_FullMethodName]
	delete(methods, ententev1.DataPlane_Status_FullMethodName)
	defer func() { methods[ententev1.DataPlane_Status_FullMethodName] = row }()
	if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method without a row: %v", err)
	}
	if !strings.Contains(log.String(), "administrative call refused") {
		t.Errorf("the refusal is not in the log: %s", log)
	}
}

// What is no gateway cannot be drained, and says what can be done instead.
func TestDrainOfAnotherProcess(t *testing.T) {
	socket, log := local(t, &process{})
	client := dial(t, socket)
	if _, err := client.Drain(t.Context(), &ententev1.DrainRequest{}); status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "entente service drain") {
		t.Errorf("drain: %v", err)
	}
	if _, err := client.Undrain(t.Context(), &ententev1.UndrainRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("undrain: %v", err)
	}
	if strings.Count(log.String(), "outcome=Unimplemented") != 2 {
		t.Errorf("log: %s", log)
	}
}

// Callers cannot have more held for them than there is room for.
func TestBounds(t *testing.T) {
	p := &process{asked: make(chan struct{}, maxCalls+1), hold: make(chan struct{})}
	release := sync.OnceFunc(func() { close(p.hold) })
	socket, _ := local(t, p)
	t.Cleanup(release)
	answers := make(chan error, maxCalls)
	for range maxCalls {
		client := dial(t, socket)
		go func() {
			_, err := client.Status(context.Background(), &ententev1.DataPlaneStatusRequest{})
			answers <- err
		}()
		<-p.asked
	}
	client := dial(t, socket)
	if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one call more than there is room for: %v", err)
	}
	release()
	for range maxCalls {
		if err := <-answers; err != nil {
			t.Errorf("control: %v", err)
		}
	}
	if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{}); err != nil {
		t.Errorf("control: when the others have ended: %v", err)
	}

	if _, err := client.Status(t.Context(), &ententev1.DataPlaneStatusRequest{Service: strings.Repeat("x", maxMessage)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of over %d bytes: %v", maxMessage, err)
	}
	raw, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := raw.Write([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	raw.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 1<<10)
	n, _ := raw.Read(answer)
	if bytes.Contains(answer[:n], []byte("200")) {
		t.Errorf("HTTP/1.1 is answered: %q", answer[:n])
	}
}
