"""URLs of a site with the admin and the status page: to be imported where that is installed."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("peers/", include("django_proxysql.monitoring.urls")),
]
