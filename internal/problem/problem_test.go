package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/entente-mesh/entente/internal/refusal"
)

func answer(p Problem, change func(*http.Request)) *http.Response {
	r := httptest.NewRequest("GET", "http://accounts.banking.example/v1/balance/42", nil)
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	w.Header().Set("Content-Encoding", "gzip")
	p.Write(w, r)
	return w.Result()
}

func TestWriteHTTP(t *testing.T) {
	res := answer(Problem{Reason: refusal.AgreementCaller, RequestID: "01JC"}, nil)
	data, _ := io.ReadAll(res.Body)
	const want = `{"type":"urn:entente:refused:agreement-caller","title":"No agreement lists this caller.","status":403,"request_id":"01JC","next":"Both domains add the caller to the agreement."}` + "\n"
	if string(data) != want {
		t.Errorf("got  %s\nwant %s", data, want)
	}
	if res.StatusCode != 403 || res.Header.Get("Content-Type") != "application/problem+json" || res.Header.Get("X-Request-Id") != "01JC" || res.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("%d %v", res.StatusCode, res.Header)
	}
	for _, absent := range []string{"Content-Encoding", "Retry-After", "WWW-Authenticate", "Grpc-Status"} {
		if v := res.Header.Values(absent); v != nil {
			t.Errorf("%s: %q", absent, v)
		}
	}
	if reason, ok := FromHeader(res.Header); !ok || reason != refusal.AgreementCaller {
		t.Errorf("the header says %q", res.Header.Get(Header))
	}
	var body struct{ Type string }
	if err := json.Unmarshal(data, &body); err != nil {
		t.Fatal(err)
	}
	if body.Type != TypePrefix+string(refusal.AgreementCaller) {
		t.Errorf("the type says %q", body.Type)
	}
}

func TestWriteHEAD(t *testing.T) {
	res := answer(Problem{Reason: refusal.NoRoute}, func(r *http.Request) { r.Method = "HEAD" })
	data, _ := io.ReadAll(res.Body)
	if len(data) != 0 || res.StatusCode != 404 || res.Header.Get("Content-Length") == "0" {
		t.Errorf("%d %v %q", res.StatusCode, res.Header, data)
	}
}

func TestWriteChallengesAndRetries(t *testing.T) {
	for _, test := range []struct {
		problem      Problem
		header, want string
	}{
		{Problem{Reason: refusal.TokenMissing}, "WWW-Authenticate", `Bearer realm="entente"`},
		{Problem{Reason: refusal.TokenInvalid, Challenge: `realm="trading"`}, "WWW-Authenticate", `Bearer realm="trading", error="invalid_token"`},
		{Problem{Reason: refusal.TokenExpired}, "WWW-Authenticate", `Bearer realm="entente", error="invalid_token", error_description="the token has expired"`},
		{Problem{Reason: refusal.Rate}, "Retry-After", "1"},
		{Problem{Reason: refusal.Rate, RetryAfter: 1200 * time.Millisecond}, "Retry-After", "2"},
		{Problem{Reason: refusal.NotReady, RetryAfter: 3 * time.Second}, "Retry-After", "3"},
		{Problem{Reason: refusal.NotReady}, "Retry-After", ""},
	} {
		if got := answer(test.problem, nil).Header.Get(test.header); got != test.want {
			t.Errorf("%+v: %s is %q, want %q", test.problem, test.header, got, test.want)
		}
	}
}

func TestWriteGRPC(t *testing.T) {
	grpc := func(r *http.Request) { r.Method = "POST"; r.Header.Set("Content-Type", "application/grpc+proto") }
	res := answer(Problem{Reason: refusal.NoEndpoint, Detail: "100% gone\n", RequestID: "01JC"}, grpc)
	data, _ := io.ReadAll(res.Body)
	if res.StatusCode != 200 || len(data) != 0 || res.Header.Get("Content-Type") != "application/grpc" || res.Header.Get("Grpc-Status") != "14" {
		t.Errorf("%d %v %q", res.StatusCode, res.Header, data)
	}
	if got, want := res.Header.Get("Grpc-Message"), "no-endpoint: No instance of the service can be reached now. 100%25 gone%0A (request 01JC)"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if reason, ok := FromHeader(res.Header); !ok || reason != refusal.NoEndpoint {
		t.Error("the reason is missing")
	}
	for contentType, want := range map[string]bool{
		"application/grpc": true, "APPLICATION/GRPC": true, "application/grpc+json": true, "application/grpc; x=y": true,
		"application/grpc-web": false, "application/grpcx": false, "application/json": false, "": false,
	} {
		r := httptest.NewRequest("POST", "/", nil)
		r.Header.Set("Content-Type", contentType)
		if IsGRPC(r) != want {
			t.Errorf("IsGRPC of %q is not %v", contentType, want)
		}
	}
}

// What an application answers is not mistaken for a refusal of the mesh.
func TestFromHeader(t *testing.T) {
	for _, h := range []http.Header{
		{}, {Header: {"no-such"}}, {Header: {""}}, {Header: {"rate", "rate"}}, {Header: {"Rate"}}, {Header: {"rate "}}, {Header: {"urn:entente:refused:rate"}},
	} {
		if reason, ok := FromHeader(h); ok {
			t.Errorf("%v says %q", h, reason)
		}
	}
	if _, ok := FromHeader(http.Header{Header: {"rate"}}); !ok {
		t.Error("rate is not understood")
	}
}

func TestDetailIsBounded(t *testing.T) {
	p := Problem{Reason: refusal.BadRequest, Detail: strings.Repeat("é", 1000)}
	data, err := json.Marshal(p)
	if err != nil || len(data) > 1000 || !utf8.Valid(data) {
		t.Errorf("%d bytes: %v", len(data), err)
	}
}

func TestProblemIsAnError(t *testing.T) {
	err := fmt.Errorf("forward: %w", Problem{Reason: refusal.Timeout, Detail: "after 15s"})
	var p Problem
	if !errors.As(err, &p) || p.Reason != refusal.Timeout || !strings.Contains(err.Error(), "refused: timeout: after 15s") {
		t.Error(err)
	}
}

func FuzzWrite(f *testing.F) {
	f.Add("rate", "detail", "01JC", "next", true)
	f.Fuzz(func(t *testing.T, reason, detail, id, next string, grpc bool) {
		r := httptest.NewRequest("GET", "/", nil)
		if grpc {
			r.Header.Set("Content-Type", "application/grpc")
		}
		w := httptest.NewRecorder()
		Problem{Reason: refusal.Reason(reason), Detail: detail, RequestID: id, Next: next}.Write(w, r)
		res := w.Result()
		if strings.ContainsAny(res.Header.Get("Grpc-Message"), "\r\n\x00") {
			t.Fatalf("the message breaks the header: %q", res.Header.Get("Grpc-Message"))
		}
		if !grpc {
			var body map[string]any
			if err := json.NewDecoder(res.Body).Decode(&body); err != nil {
				t.Fatal(err)
			}
		}
	})
}
