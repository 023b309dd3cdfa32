package server_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/ca/signer"
)

// disk is a log file on a disk that has so many bytes left; -1: enough.
type disk struct {
	text strings.Builder
	left int
}

func (d *disk) Write(b []byte) (int, error) {
	if d.left < 0 || len(b) <= d.left {
		if d.left >= 0 {
			d.left -= len(b)
		}
		return d.text.Write(b)
	}
	n, _ := d.text.Write(b[:d.left])
	d.left = 0
	return n, syscall.ENOSPC
}

func (d *disk) lines(t *testing.T) (kinds []string) {
	t.Helper()
	for line := range strings.Lines(d.text.String()) {
		var one struct{ Kind, What, Result string }
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			kinds = append(kinds, "torn")
			continue
		}
		kinds = append(kinds, strings.TrimSpace(one.Kind+" "+one.What+" "+one.Result))
	}
	return kinds
}

func TestAuditOnAFullDisk(t *testing.T) {
	var log strings.Builder
	registry := prometheus.NewRegistry()
	full := &disk{left: -1}
	audit := server.NewAudit(full, "ca-1", false, slog.New(slog.NewTextHandler(&log, nil)), registry)
	act := func(what string) { audit.Act("somebody", what, nil, 0, nil) }
	act("a")
	full.left = 20 // the next line is torn
	act("b")
	act("c")
	if err := audit.Asked("somebody", "d"); err != nil {
		t.Errorf("a log that is not required stops an act: %v", err)
	}
	full.left = -1
	act("e")
	act("f")
	if got := strings.Join(full.lines(t), ", "); got != "act a done, torn, gap, act e done, act f done" {
		t.Errorf("lines: %s\n%s", got, full.text.String())
	}
	if !strings.Contains(full.text.String(), `"kind":"gap","node":"ca-1","lost":2`) {
		t.Errorf("the gap is not said: %s", full.text.String())
	}
	if families, err := registry.Gather(); err != nil || families[0].GetMetric()[0].GetCounter().GetValue() != 2 {
		t.Errorf("metric: %v, %v", families, err)
	}
	if said := strings.Count(log.String(), "cannot be written"); said != 1 || !strings.Contains(log.String(), "can be written again") {
		t.Errorf("the process's log says it %d times:\n%s", said, log.String())
	}
}

// stuck is a disk that does not answer while it is held.
type stuck struct {
	disk
	held chan struct{} // closed when it answers again; nil: it answers
}

func (s *stuck) Room() (left, bound int64) {
	if s.held != nil {
		<-s.held
	}
	return 1 << 30, 1 << 30
}

// A disk that hangs is waited for once. Then SVIDs are counted without waiting, acts go to
// the process's log or, where the log is required, are refused; and all goes on, with what
// is missing said, when the disk answers.
func TestAuditOnADiskThatHangs(t *testing.T) {
	for _, required := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			var log strings.Builder
			w := &stuck{disk: disk{left: -1}}
			audit := server.NewAudit(w, "ca-1", required, slog.New(slog.NewTextHandler(&log, nil)), nil)
			svid := signer.Issued{Kind: "x509-svid", ID: spiffeid.RequireFromString("spiffe://banking.example/a"), Origin: ca.Origin{Entry: "service/a", Agent: "h1"}}
			took := func(f func()) time.Duration {
				begin := time.Now()
				f()
				return time.Since(begin)
			}
			if d := took(func() { audit.Issued(svid, 1); audit.Act("somebody", "a", nil, 0, audit.Asked("somebody", "a")) }); d != 0 || audit.Problem() != nil {
				t.Fatalf("control: %v, %v", d, audit.Problem())
			}
			control := len(w.lines(t))

			w.held = make(chan struct{})
			if d := took(func() { audit.Issued(svid, 1) }); d > 2*time.Second {
				t.Errorf("the first SVID waited %v", d)
			}
			if d := took(func() {
				for range 100 {
					audit.Issued(svid, 1)
				}
			}); d != 0 {
				t.Errorf("further SVIDs waited %v", d)
			}
			if err := audit.Problem(); err == nil || !strings.Contains(err.Error(), "does not answer") {
				t.Errorf("the problem is %v", err)
			}
			err := error(nil)
			if d := took(func() { err = audit.Asked("somebody", "b") }); d > 2*time.Second || (err != nil) != required {
				t.Errorf("an act is answered %v after %v", err, d)
			}
			if d := took(func() { audit.Act("somebody", "b", nil, 0, err); audit.Flush() }); d > 2*time.Second || !strings.Contains(log.String(), "act that is missing") {
				t.Errorf("the act is not in the process's log after %v:\n%s", d, log.String())
			}

			close(w.held)
			synctest.Wait()
			w.held = nil
			audit.Act("somebody", "c", nil, 0, nil)
			audit.Issued(svid, 1)
			audit.Flush()
			if audit.Problem() != nil {
				t.Errorf("it goes on to have a problem: %v", audit.Problem())
			}
			if got := strings.Join(w.lines(t)[control:], ", "); got != "x509-svid, gap, act c done, x509-svid, count" {
				t.Errorf("lines: %s", got)
			}
			if text := w.text.String(); !strings.Contains(text, `"lost":1`) || !strings.Contains(text, `"number":101`) {
				t.Errorf("what is missing is not said:\n%s", text)
			}
		})
	}
}

func TestRequiredAudit(t *testing.T) {
	full := &disk{left: -1}
	audit := server.NewAudit(full, "ca-1", true, slog.New(slog.NewTextHandler(io.Discard, nil)), nil)
	if err := audit.Asked("somebody", "a"); err != nil {
		t.Fatalf("control: %v", err)
	}
	full.left = 0
	wantCode(t, "on a full disk", audit.Asked("somebody", "b"), codes.FailedPrecondition)
	full.left = -1
	if err := audit.Asked("somebody", "c"); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if got := strings.Join(full.lines(t), ", "); got != "act a asked, act c asked" {
		t.Errorf("lines: %s", got)
	}
}

// A real device that is always full: the node signs, its operators are refused where the
// log is required and are not where it is not.
func TestNodeWithAFullAuditDisk(t *testing.T) {
	t.Parallel()
	if f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err != nil {
		t.Skip("this system has no /dev/full")
	} else {
		f.Close()
	}
	for _, required := range []bool{false, true} {
		c := catest.Prepare(t, catest.Options{})
		c.Config().Audit = node.Audit{File: filepath.Join(t.TempDir(), "audit.log"), Required: required}
		if err := os.Symlink("/dev/full", c.Config().Audit.File); err != nil {
			t.Fatal(err)
		}
		if err := node.Init(c.Config(), c.KeepRecoveryKey); err != nil {
			t.Fatal(err)
		}
		c.Restart()
		c.WaitReady() // it prepares, activates and signs
		_, err := c.TryApply(twoHosts)
		if required {
			wantCode(t, "required", err, codes.FailedPrecondition)
		} else if err != nil {
			t.Errorf("not required: %v", err)
		}
		if text := metricsOf(t, c); !strings.Contains(text, "entente_ca_audit_failures_total ") || strings.Contains(text, "entente_ca_audit_failures_total 0") {
			t.Error("the failures are not counted")
		}
		c.Stop()
	}
}

// Tokens stand in the log as well, by the digest of what is signed; so do calls that
// were refused before they began.
func TestAuditOfTokensAndRefusals(t *testing.T) {
	t.Parallel()
	f := newOffice(t, catest.Options{})
	host := attest(t, f.ca, "h1")
	conn := dial(t, f.ca, &host)
	jwt, err := ententev1.NewSignClient(conn).SignJWT(t.Context(), &ententev1.SignJWTRequest{Requests: []*ententev1.JWTRequest{{EntryId: "service/accounts", Audience: []string{"ledger"}}}})
	if err != nil {
		t.Fatal(err)
	}
	wit, err := ententev1.NewSignClient(conn).SignWIT(t.Context(), &ententev1.SignWITRequest{Requests: []*ententev1.WITRequest{{EntryId: "service/accounts", Csr: csrOf(t, newKey(t))}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.as("vic").BanAgent(t.Context(), &ententev1.ChangeAgentRequest{Name: "h1"})
	wantCode(t, "a viewer bans", err, codes.PermissionDenied)
	stream, err := ententev1.NewAdminClient(conn).SaveSnapshot(t.Context(), &ententev1.SaveSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); errors.Is(err, io.EOF) || err == nil {
		t.Error("an agent saved a snapshot")
	}

	_, raw := auditLines(t, f.ca)
	text := string(raw)
	for kind, token := range map[string]string{"jwt-svid": jwt.GetResults()[0].GetToken(), "wit-svid": wit.GetResults()[0].GetToken()} {
		digest := sha256Hex(token[:strings.LastIndexByte(token, '.')])
		if token == "" || !strings.Contains(text, `"kind":"`+kind+`"`) || !strings.Contains(text, `"digest":"`+digest+`"`) || strings.Contains(text, token) {
			t.Errorf("%s %s does not stand there as it should", kind, digest)
		}
	}
	for _, want := range []string{`"audience":["ledger"]`, `"who":"spiffe://banking.example/people/vic","what":"BanAgent","on":["agent/h1"],"result":"refused"`,
		`"who":"spiffe://banking.example/entente/agent/h1","what":"SaveSnapshot","result":"refused"`} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

func sha256Hex(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}
